"""Scorer against the losses of examples one at a time, and its quantities against hand-worked numbers."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from scoring_cases import CASES, LENGTHS, bert, gpt2, losses_alone
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from hf_efx.core.scoring.scorer import QUANTITIES, Scorer, infer_task, measure


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_size", [None, 4, 1])
def test_scores_are_those_of_one_example_at_a_time(case, batch_size):
    task, build = CASES[case]
    model, batch, rows = build()
    expected, _ = losses_alone(model, rows)
    model.train()
    assert infer_task(model) == task
    scores = Scorer(("loss", "count"), batch_size=batch_size)(model, batch)
    assert scores["loss"].dtype == torch.float32 and scores["count"].dtype == torch.int64
    torch.testing.assert_close(scores["loss"], expected, rtol=1e-5, atol=1e-5)
    assert expected.unique().numel() > 4  # rows that can be told apart


TOKEN_CASES = [name for name, (task, _) in CASES.items() if task not in ("classification", "regression")]


@pytest.mark.parametrize("case", TOKEN_CASES)
def test_token_scores_stand_at_their_tokens(case):
    task, build = CASES[case]
    model, batch, rows = build()
    _, logits = losses_alone(model, rows)
    scores = Scorer(("loss", "correct", "count"), granularity="token", batch_size=4)(model, batch)
    labels = batch["labels"]
    if task == "causal":
        # Nothing precedes an example's first token, not even padding (which a model's own loss would start from).
        first = (batch["attention_mask"].cumsum(1) == 1) & (batch["attention_mask"] == 1)
        labels = F.pad(labels.masked_fill(first, -100)[:, 1:], (0, 1), value=-100)
    assert torch.equal(scores["mask"], labels != -100)
    for row, own in enumerate(rows):
        targets = own["labels"][0, 1:] if task == "causal" else own["labels"][0]
        valid = targets != -100
        losses = F.cross_entropy(logits[row][0, : len(targets)], targets, reduction="none")[valid]
        torch.testing.assert_close(scores["loss"][row][scores["mask"][row]], losses, rtol=1e-5, atol=1e-5)
        right = logits[row][0, : len(targets)].argmax(-1)[valid] == targets[valid]
        assert scores["correct"][row][scores["mask"][row]].bool().tolist() == right.tolist()
        assert scores["count"][row] == valid.sum()
    assert scores["loss"][~scores["mask"]].eq(0).all()


def test_examples_without_a_target_have_loss_and_count_0():
    model, batch, _ = CASES["gpt2 right"][1]()
    batch["labels"][1] = -100
    scores = Scorer(QUANTITIES, batch_size=2)(model, batch)
    assert {name: value[1].item() for name, value in scores.items()} == dict.fromkeys(QUANTITIES, 0)
    assert LENGTHS[2] == 1 and scores["count"][2] == 0  # one token: nothing precedes it
    assert scores["loss"][0] > 0


def test_a_batch_is_left_as_it_was():
    for case in ("gpt2 left", "t5 left"):
        model, batch, _ = CASES[case][1]()
        before = {name: value.clone() for name, value in batch.items()}
        Scorer(batch_size=2)(model, batch)
        assert list(batch) == list(before)
        assert all(torch.equal(batch[name], before[name]) for name in before)


HALF = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [0.0, 0.0]])  # 1/4 and 3/4; 1/2 and 1/2


def test_quantities_by_hand():
    values = measure(HALF, torch.tensor([0, 1, -100]), "classification", QUANTITIES)
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    expected = {
        "loss": [math.log(4), math.log(4 / 3), 0],
        "correct": [0, 1, 0],
        "grad_norm": [0.75 * math.sqrt(2), 0.25 * math.sqrt(2), 0],
        "entropy": [entropy, entropy, 0],
        "count": [1, 1, 0],
    }
    assert set(values) == set(expected)  # the rest takes several passes
    for name, numbers in expected.items():
        torch.testing.assert_close(values[name], torch.tensor(numbers, dtype=values[name].dtype))
    # Over tokens, by example: the mean over the valid ones.
    values = measure(HALF[None], torch.tensor([[0, 1, -100]]), "masked", ("grad_norm", "correct"))
    assert values["grad_norm"].item() == pytest.approx(0.5 * math.sqrt(2)) and values["correct"].item() == 0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradient_norm_is_autograd_s(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 5, generator=generator) * 4).requires_grad_()
    labels = torch.randint(0, 5, (6,), generator=generator)
    gradient = torch.autograd.grad(
        F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum"), logits
    )[0]
    values = measure(logits.detach(), labels, "classification", ("grad_norm",), label_smoothing=smoothing)
    torch.testing.assert_close(values["grad_norm"], gradient.norm(dim=1), rtol=1e-5, atol=1e-7)
    targets = torch.randn(6, 5, generator=generator)
    gradient = torch.autograd.grad(F.mse_loss(logits, targets, reduction="none").mean(1).sum(), logits)[0]
    values = measure(logits.detach(), targets, "regression", ("grad_norm", "count"))
    torch.testing.assert_close(values["grad_norm"], gradient.norm(dim=1))
    assert values["count"].tolist() == [1] * 6


def test_gradient_norm_keeps_digits_where_the_model_is_sure():
    logits = torch.tensor([[20.0, 0.0]])
    values = measure(logits, torch.tensor([0]), "classification", ("grad_norm",))
    assert values["grad_norm"].item() == pytest.approx(math.sqrt(2) / (1 + math.exp(20)), rel=1e-5)


def test_minus_infinite_logits_have_an_entropy():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    values = measure(logits, torch.tensor([0]), "classification", ("entropy", "loss"))
    assert values["entropy"].item() == values["loss"].item() == pytest.approx(math.log(2))


class Scripted(nn.Module):
    """Gives the logits that it is told to, one after the other."""

    def __init__(self, samples):
        super().__init__()
        self.samples, self.calls = samples, 0

    def forward(self, x):
        logits = self.samples[self.calls % len(self.samples)]
        self.calls += 1
        return logits[x]


def test_mutual_information_by_hand():
    # Row 0: sure of one class, then of the other; row 1: unsure in both samples.
    sure = torch.tensor([[50.0, -50.0], [0.0, 0.0]])
    model = Scripted([sure, torch.stack([-sure[0], sure[1]])])
    batch = {"x": torch.arange(2), "labels": torch.tensor([0, 0])}
    scores = Scorer(("bald", "conditional_entropy", "mc_loss"), task="classification", mc_samples=2)(model, batch)
    torch.testing.assert_close(scores["bald"], torch.tensor([math.log(2), 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores["conditional_entropy"], torch.tensor([0.0, math.log(2)]), atol=1e-6, rtol=0)
    # Labels of class 0: no loss and 100 nats in row 0, ln 2 twice in row 1.
    torch.testing.assert_close(scores["mc_loss"], torch.tensor([50.0, math.log(2)]), atol=1e-6, rtol=0)
    assert model.calls == 2  # no pass for quantities that nobody asked for


def test_dropout_samples_of_a_transformer():
    model, batch, _ = CASES["gpt2 right"][1]()
    quantities = ("bald", "conditional_entropy")
    model.eval()
    scores = Scorer(quantities, batch_size=3, mc_samples=20)(model, batch)
    valid = torch.tensor(LENGTHS) > 1
    assert (scores["bald"][valid] > 0).all() and scores["bald"].max() < scores["conditional_entropy"].max()
    again = Scorer(quantities, batch_size=3, mc_samples=20)(model, batch)
    assert torch.equal(scores["bald"], again["bald"])  # the random state was put back
    tokens = Scorer(quantities, granularity="token", mc_samples=3)(model, batch)
    assert torch.equal(tokens["mask"], Scorer(granularity="token")(model, batch)["mask"])
    losses = [Scorer(("mc_loss",), granularity=kind, mc_samples=3)(model, batch) for kind in ("example", "token")]
    counts = losses[1]["mask"].sum(1).clamp(min=1)
    torch.testing.assert_close(losses[0]["mc_loss"], losses[1]["mc_loss"].sum(1) / counts)
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with pytest.raises(ValueError, match="10 samples of the model are all alike: raise its dropout"):
        Scorer(quantities)(model, batch)


def test_label_smoothing_is_that_of_the_trainer():
    model, batch, _ = CASES["gpt2 right"][1]()
    with torch.no_grad():
        outputs = model.eval()(**batch)
    own = LabelSmoother(0.1)(outputs, batch["labels"], shift_labels=True)
    scores = Scorer(("loss", "count"), label_smoothing=0.1)(model, batch)
    mean = (scores["loss"] * scores["count"]).sum() / scores["count"].sum()
    assert mean.item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_close(precision):
    model, batch, _ = CASES["bert classes"][1]()
    exact = Scorer()(model, batch)["loss"]
    blurred = Scorer(precision=precision)(model, batch)["loss"]
    assert blurred.dtype == torch.float32
    torch.testing.assert_close(blurred, exact, rtol=2e-2, atol=2e-2)
    assert not torch.equal(blurred, exact)


def test_a_peft_model_is_scored_as_what_it_wraps():
    model, batch, rows = CASES["gpt2 left"][1]()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_proj"], r=2, fan_in_fan_out=True)
    )
    assert infer_task(adapted) == "causal"
    expected, _ = losses_alone(adapted, rows)
    torch.testing.assert_close(Scorer(batch_size=2)(adapted, batch)["loss"], expected, rtol=1e-5, atol=1e-5)


class OwnLoss(nn.Module):
    """A model of one's own, which can't do without labels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.head(x)
        return F.cross_entropy(logits, labels), logits


def test_models_of_one_s_own():
    model = OwnLoss()
    batch = {"x": torch.randn(5, 4), "labels": torch.randint(0, 3, (5,))}
    expected = F.cross_entropy(model.head(batch["x"]), batch["labels"], reduction="none").detach()
    scorer = Scorer(task="classification")
    torch.testing.assert_close(scorer(model, batch)["loss"], expected)
    model.forward = lambda x, labels: {"loss": 0.0, "logits": model.head(x)}
    torch.testing.assert_close(scorer(model, batch)["loss"], expected)
    with pytest.raises(ValueError, match="OwnLoss doesn't say which loss it computes; name the task: causal"):
        Scorer()(model, batch)


def test_the_models_own_loss_is_not_computed():
    model, batch, _ = CASES["t5"][1]()
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    Scorer(task="seq2seq")(model, batch)
    assert "labels" not in seen[0] and seen[0]["use_cache"] is False and "decoder_input_ids" in seen[0]


def test_chunks_hold_rows_of_like_length_without_padding():
    model, batch, _ = CASES["gpt2 left"][1]()
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    Scorer(task="causal", batch_size=2)(model, batch)
    shapes = shapes[2:]  # after the comparison with the model's own loss
    assert shapes == [(2, 7), (2, 5), (2, 2)]  # lengths 7 7, 5 3, 2 1


def test_multi_label_and_unknown_heads_are_not_guessed():
    with pytest.raises(ValueError, match="several labels an example"):
        infer_task(bert(transformers.BertForSequenceClassification, problem_type="multi_label_classification"))
    with pytest.raises(ValueError, match="BertForQuestionAnswering doesn't say"):
        infer_task(bert(transformers.BertForQuestionAnswering, 2))

    class Mine(transformers.BertForTokenClassification):
        pass

    assert infer_task(bert(Mine)) == "token_classification"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantities": ("los",)}, "quantities=.*out of loss, count"),
        ({"quantities": "loss"}, "must be a list"),
        ({"task": "translation"}, "task='translation'"),
        ({"granularity": "word"}, "granularity='word'"),
        ({"mode": "test"}, "mode='test'"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mc_samples": 1}, "mc_samples=1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scorer(**options)


def test_what_can_t_be_scored_is_refused():
    model, batch, _ = CASES["bert regression"][1]()
    with pytest.raises(ValueError, match=r"quantities=\['bald', 'entropy'\] have no meaning for task='regression'"):
        Scorer(("loss", "entropy", "bald"))(model, batch)
    with pytest.raises(ValueError, match="granularity='token' has no meaning"):
        Scorer(granularity="token")(model, batch)
    with pytest.raises(ValueError, match="no 'labels' to score, only input_ids"):
        Scorer()(model, {"input_ids": batch["input_ids"]})
