"""Prunability: hand-worked answers, bisection against the grid, what it refuses, what it says."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from huggingface_hub import EvalResult
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_efx import SliceOutConfig, TargetedDropoutConfig, get_efx_model
from hf_efx.prunability import loss_curve, measure_prunability
from hf_efx.prunability.sample import Sample
from prunability.networks import cross_entropies, digits, squared_errors, trained, two_weights


def gpt2(**settings) -> GPT2LMHeadModel:
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **settings}))
    model.loss_type = "ForCausalLM"
    return model


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize(("tolerance", "fraction"), [(0.4, 1.0), (0.5, 0.5), (4.9, 0.5), (5.0, 0.01)])
def test_two_weights_by_hand(tolerance, fraction, exhaustive):
    model, losses = two_weights()  # mean losses: 0 whole, 0.5 of one weight, 5 of none
    result = measure_prunability(model, losses, tolerance, tolerance_mode="absolute", exhaustive=exhaustive)
    assert result.fraction == fraction
    assert result.lowest == (fraction if exhaustive else None)
    assert result.evaluations == (101 if exhaustive else 8 if fraction == 0.01 else 9)
    assert (result.loss, result.bound, result.weights, result.samples) == (0.0, tolerance, 2, 2)
    assert result.kept == {"weight": {1.0: 1.0, 0.5: 0.5, 0.01: 0.0}[fraction]}
    assert result.curve.at(0.0) == 0.0 and result.curve.at(0.5) == 0.5
    if exhaustive:
        assert result.curve.at(0.51) == 5.0  # of 2 weights 0.49 is none


def test_orthogonal_features_in_closed_form():
    """On orthonormal inputs X and targets X w + 0.25 pruning the set P adds sum over P of w^2 + 0.5 w sum(x)."""
    n = 64
    generator = torch.Generator().manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    model = nn.Linear(n, 1, bias=False, dtype=torch.float64)
    w = torch.randn(n, generator=generator, dtype=torch.float64)
    model.weight.data[0] = w
    result = measure_prunability(model, squared_errors(inputs, (inputs @ w)[:, None] + 0.25), 0.03, exhaustive=True)
    added = (w.square() + 0.5 * w * inputs.sum(0))[w.abs().argsort()].cumsum(0)
    wanted = [0.0625 + float(added[n - n * step // 100 - 1]) / n for step in range(1, 100)] + [0.0625]
    assert result.loss == pytest.approx(0.0625, abs=1e-12)
    for step, loss in enumerate(wanted, 1):
        assert result.curve.at(1 - step / 100) == pytest.approx(loss, abs=1e-12)
    within = [loss <= 0.0625 * 1.03 for loss in wanted]
    assert result.lowest == (within.index(True) + 1) / 100
    assert result.fraction == (100 - within[::-1].index(False) + 1) / 100


def test_bisection_is_the_grid_on_trained_networks():
    pixels, labels = digits(60)
    losses = cross_entropies(pixels, labels)
    same = 0
    for seed in range(10):
        model = trained(pixels, labels, width=4 + 4 * seed, seed=seed, target=0.1)
        grid, fast = measure_prunability(model, losses, exhaustive=True), measure_prunability(model, losses)
        assert fast.evaluations <= 12 and grid.lowest is not None
        if grid.lowest == grid.fraction:  # monotone where it crosses the bound
            same += 1
            assert abs(fast.fraction - grid.fraction) <= 0.01 + 1e-12
        assert grid.lowest <= fast.fraction <= grid.fraction
        assert fast.interval is not None and fast.interval[0] <= fast.fraction <= fast.interval[1] + 1e-12
    assert same >= 5


def test_a_loss_that_is_not_monotone_has_two_answers():
    model = nn.Linear(10, 10, bias=False)

    def losses(model):
        kept = int((model.weight != 0).sum())
        return torch.tensor([2.0 if 40 <= kept < 60 or kept < 20 else 1.0])

    result = measure_prunability(model, losses, exhaustive=True)
    assert (result.lowest, result.fraction) == (0.2, 0.6)


def test_memorised_labels_need_more_weights():
    pixels, labels = digits(300)
    permuted = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    found = {}
    for name, target in (("true", labels), ("permuted", permuted)):
        model = trained(pixels, target, width=128, seed=0)
        found[name] = measure_prunability(model, cross_entropies(pixels, target), tolerance=1.0).fraction
    assert found["permuted"] > found["true"] + 0.1


def test_crossing_by_hand():
    steps = loss_curve.np.array([10, 20, 50, 100])
    assert loss_curve._crossing(steps, [3.0, 1.0, -0.5, -1.0]) == 40.0  # two thirds of the way from 20 to 50
    assert loss_curve._crossing(steps, [-1.0, 2.0, -2.0, -1.0]) == 35.0  # the last crossing counts
    assert loss_curve._crossing(steps, [-1.0, -1.0, -1.0, -1.0]) == 10.0


def test_interval_narrows_with_examples():
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    widths = []
    for count in (20, 2000):
        inputs = torch.randn(count, 50)
        losses = squared_errors(inputs, model(inputs).detach() + torch.randn(count, 1))
        interval = measure_prunability(model, losses).interval
        assert interval is not None
        widths.append(interval[1] - interval[0])
    assert widths[1] < widths[0]


def test_a_number_and_weighted_losses():
    model, losses = two_weights()
    number = measure_prunability(model, lambda m: float(losses(m).mean()), 0.5, tolerance_mode="absolute")
    assert (number.fraction, number.interval, number.samples) == (0.5, None, None)
    # With three quarters on the first example one weight alone costs 0.25.
    for tolerance, fraction in ((0.25, 0.5), (0.2, 1)):
        weighted = lambda m: (losses(m), torch.tensor([3, 1]))  # noqa: E731
        assert measure_prunability(model, weighted, tolerance, tolerance_mode="absolute").fraction == fraction


def test_a_data_set_gives_the_models_own_loss():
    torch.manual_seed(0)
    model = gpt2()
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist(), "other": 1} for ids in torch.randint(16, (12, 6))]
    for row in rows[:6]:  # half of the examples have fewer labels
        row["labels"] = [*row["labels"][:3], -100, -100, -100]
    result = measure_prunability(model, rows, samples=None, batch_size=5)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        assert result.loss == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
    assert result.samples == 12
    again = measure_prunability(model, rows, samples=7, seed=3)
    assert again.samples == 7 and again.loss != result.loss
    assert again.loss == measure_prunability(model, rows, samples=7, seed=3).loss


def test_labels_of_classes_and_margins():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    config.num_labels = 3
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    rows = [{"input_ids": ids.tolist(), "label": i % 3} for i, ids in enumerate(torch.randint(20, (9, 5)))]
    sample = Sample(rows, batch_size=4)
    with torch.no_grad():
        losses, margins = sample.outcome(model)
        logits = model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits
    assert torch.allclose(losses.double(), sample(model)[0], atol=1e-6)
    one = logits[4]  # label 1
    assert float(margins[4]) == pytest.approx(float(one[1] - max(one[0], one[2])), abs=1e-6)
    targets = torch.tensor([i % 3 for i in range(9)])
    smooth = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    assert torch.allclose(sample.smoothed(0.1)(model)[0], smooth.double(), atol=1e-6)


def text(count: int = 8) -> list[dict[str, list[int]]]:
    ids = torch.randint(1, 16, (count, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def test_wrappers_and_methods_that_act_in_training_change_nothing():
    torch.manual_seed(0)
    model = gpt2().train()
    plain = measure_prunability(model, text())
    assert measure_prunability(torch.compile(model, backend="eager"), text()) == plain  # pyright: ignore
    assert measure_prunability(nn.DataParallel(model), text()) == plain
    targeted = TargetedDropoutConfig(targeting=0.5, rate=0.9, target_modules=["c_fc"])
    for config in (targeted, SliceOutConfig(rate={"mlp": 0.5, "attention": 0.0})):
        assert measure_prunability(get_efx_model(copy.deepcopy(model), config), text()) == plain
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert measure_prunability(model, text()) == plain


def test_what_it_says(tmp_path):
    torch.manual_seed(0)
    model, rows = gpt2(), text()
    result = measure_prunability(model, rows, scope="layer")
    said = str(result)
    assert "embeddings left out" in said and "transformer.h.0.attn.c_attn.weight" in said and "wte" not in said
    assert result.weights == 8 * 24 + 8 * 8 + 2 * 8 * 32
    path = result.plot(tmp_path / "curve.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    (one,) = result.to_eval_results(task_type="text-generation", dataset_type="x", dataset_name="X")
    assert isinstance(one, EvalResult) and one.metric_value == result.fraction
    assert result.curve.points[0] == (0.0, result.loss)
    with_tables = measure_prunability(model, rows, embeddings=True)  # wte is the output layer too, and counts once
    assert with_tables.weights == result.weights + 16 * 8 + 8 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"tolerance": math.nan}, "tolerance=nan"),
        ({"tolerance_mode": "both"}, "tolerance_mode='both'"),
        ({"criterion": "size"}, "criterion='size'"),
        ({"scope": "row"}, "scope='row'"),
        ({"batch_size": 3, "samples": None}, "samples, batch_size: only for a data set"),
        ({}, "tolerance_mode='absolute'"),  # a loss of 0
    ],
)
def test_bad_options(options, message):
    model, losses = two_weights()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        measure_prunability(model, losses, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": "0.1"}, "tolerance='0.1': expected a number"),
        ({"tolerance": True}, "tolerance=True: expected a number"),
        ({"embeddings": "no"}, "embeddings='no': expected True or False"),
        ({"exhaustive": 1}, "exhaustive=1: expected True or False"),
        ({"seed": None}, "seed=None: expected a whole number, 0 or more"),
        ({"samples": 10.5}, "samples=10.5: expected a whole number, 1 or more"),
        ({"batch_size": "8"}, "batch_size='8': expected a whole number"),
    ],
)
def test_options_of_another_type(options, message):
    with pytest.raises(TypeError, match=message):
        measure_prunability(gpt2(), text(), **options)


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match="model is a str: expected a torch.nn.Module"):
        measure_prunability("gpt2", text())  # pyright: ignore[reportArgumentType]


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1: expected 0 or more"):
        measure_prunability(gpt2(), text(), seed=-1)


def test_one_example_has_no_interval():
    torch.manual_seed(0)
    assert measure_prunability(gpt2(), text(), samples=1).interval is None
    assert measure_prunability(gpt2(), text(), samples=2).interval is not None


def test_a_loss_that_never_sees_the_model_is_refused():
    model, losses = two_weights()
    for other in (copy.deepcopy(model), torch.compile(copy.deepcopy(model), backend="eager")):
        for tolerance, exhaustive in ((0.0, False), (0.5, True)):
            options = {"tolerance_mode": "absolute", "tolerance": tolerance, "exhaustive": exhaustive}
            with pytest.raises(ValueError, match="stays 0.0 whatever becomes of the 2 weights"):
                measure_prunability(model, lambda _, other=other: losses(other), **options)
    assert model.weight.tolist() == [[3.0, 1.0]]
    compiled = torch.compile(model, backend="eager")  # has the weights themselves
    assert measure_prunability(model, lambda _: losses(compiled), 0.5, tolerance_mode="absolute").fraction == 0.5


def test_a_new_head_of_zeros_is_measured():
    """Its loss stays what it is without a single weight; the weights are in it all the same."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    for parameter in model[1].parameters():
        nn.init.zeros_(parameter)
    inputs, labels = torch.ones(5, 4), torch.arange(5) % 3
    before = copy.deepcopy(model.state_dict())
    result = measure_prunability(model, lambda m: F.cross_entropy(m(inputs), labels, reduction="none"))
    assert result.fraction == 0.01 and result.loss == pytest.approx(math.log(3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "losses", [lambda model: None, lambda model: {"loss": 1.0}, lambda model: "3", lambda model: (1.0, 1.0, 1.0, None)]
)
def test_losses_of_another_type(losses):
    model, _ = two_weights()
    with pytest.raises(TypeError, match="the loss function returned a .*expected one loss an example"):
        measure_prunability(model, losses)


def changed(model: nn.Module) -> torch.Tensor:
    for parameter in model.parameters():
        parameter.add_(1)
    return torch.ones(2)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda model: (torch.ones(3), torch.ones(2)), r"weights of shape \[2\]"),
        (lambda model: (torch.ones(2), torch.tensor([2.0, -1.0])), "at least -1: expected one weight a loss"),
        (lambda model: changed(copy.deepcopy(model)), "whatever becomes of the 2 weights"),
        (lambda model: torch.rand(4), "random"),
        (lambda model: torch.full((3,), math.nan), "NaN"),
        (lambda model: math.inf, "inf"),
        (lambda model: torch.tensor([math.nan if (model.weight == 0).any() else 1.0]), "NaN with 50%"),
        (lambda model: torch.empty(0), "empty"),
        (lambda model: torch.ones(2, 2), r"shape \[2, 2\]"),
        (lambda model: torch.ones(int((model.weight != 0).sum()) + 1), "losses, before 3"),
    ],
)
def test_bad_losses(losses, message):
    model, _ = two_weights()
    with pytest.raises(ValueError, match=message):
        measure_prunability(model, losses)
    assert model.weight.tolist() == [[3.0, 1.0]]


def test_a_loss_function_that_trains_is_refused():
    model, _ = two_weights()
    with pytest.raises(ValueError, match="changed the weights of the model"):
        measure_prunability(model, changed)


class Stream(IterableDataset):
    def __iter__(self):
        yield from text()

    def __len__(self):
        return 8


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "dataset is empty"),
        (iter([]), {}, "list_iterator"),
        ([{"input_ids": [1, 2]}], {}, "no 'labels'"),
        ([{"input_ids": [1], "labels": [1]}], {"samples": 0}, "samples=0"),
        ([{"input_ids": [1], "labels": [1]}], {"batch_size": 0}, "batch_size=0"),
        (DatasetDict({"train": Dataset.from_list([{"input_ids": [1]}])}), {}, "DatasetDict, .*pass one split"),
        (Stream(), {}, "Stream, whose rows can't be drawn"),
        (TensorDataset(torch.ones(2, 3), torch.ones(2)), {}, "rows of type tuple"),
        ([([1, 2], 0)], {"data_collator": lambda rows: [torch.ones(1), torch.ones(1)]}, "'labels', but is a list"),
        (text(), {"data_collator": DataCollatorWithFlattening()}, "1 rows of 8 examples|several examples each"),
        ([{"labels": [1, 2]}, {"labels": [1]}], {}, "don't make a batch.*give a data_collator that pads"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], {}, "no example of the sample has a label"),
        (text(), {"label_smoothing": 1.5}, "label_smoothing=1.5"),
    ],
)
def test_bad_samples(data, options, message):
    with pytest.raises(ValueError, match=message):
        measure_prunability(gpt2(), data, **options)
