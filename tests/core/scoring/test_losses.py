"""per_example_loss against hand-worked numbers and against the losses that transformers' models compute themselves."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efx.core.scoring.losses import aligned_labels, per_example_loss

LN4, LN4_3 = math.log(4), math.log(4 / 3)
# Logits whose softmax is 1/4 for class 0 and 3/4 for class 1.
QUARTER = torch.tensor([0.0, math.log(3)], dtype=torch.float64)


def test_causal_by_hand():
    logits = QUARTER.expand(3, 4, 2)
    labels = torch.tensor([[0, 1, 1, 0], [1, -100, 0, -100], [1, -100, -100, -100]])
    loss, count = per_example_loss(logits, labels, "causal")
    # Example 0 predicts 1, 1, 0; example 1 only the 0; example 2's one label is the first, which nothing predicts.
    torch.testing.assert_close(loss, torch.tensor([(2 * LN4_3 + LN4) / 3, LN4, 0.0], dtype=torch.float64))
    assert count.tolist() == [3, 1, 0]
    tokens, mask = per_example_loss(logits, labels, "causal", granularity="token")
    expected = [[LN4_3, LN4_3, LN4, 0], [0, LN4, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(tokens, torch.tensor(expected, dtype=torch.float64))
    assert mask.tolist() == [[True, True, True, False], [False, True, False, False], [False] * 4]


def test_labels_are_aligned_with_the_logits_that_predict_them():
    labels = torch.tensor([[3, 4, -100, 5]])
    assert aligned_labels(labels, "causal").tolist() == [[4, -100, 5, -100]]
    assert aligned_labels(labels, "seq2seq") is labels


@pytest.mark.parametrize("task", ["seq2seq", "masked", "token_classification"])
def test_unshifted_by_hand(task):
    logits = QUARTER.expand(2, 3, 2)
    labels = torch.tensor([[0, 1, -100], [-100, -100, 1]])
    loss, count = per_example_loss(logits, labels, task)
    torch.testing.assert_close(loss, torch.tensor([(LN4 + LN4_3) / 2, LN4_3], dtype=torch.float64))
    assert count.tolist() == [2, 1]


def test_classification_and_smoothing_by_hand():
    logits = QUARTER.expand(3, 2)
    labels = torch.tensor([0, 1, -100])
    loss, count = per_example_loss(logits, labels, "classification")
    torch.testing.assert_close(loss, torch.tensor([LN4, LN4_3, 0], dtype=torch.float64))
    assert count.tolist() == [1, 1, 0]
    smooth, _ = per_example_loss(logits, labels, "classification", label_smoothing=0.2)
    spread = (LN4 + LN4_3) / 2
    expected = torch.tensor([0.8 * LN4 + 0.2 * spread, 0.8 * LN4_3 + 0.2 * spread, 0], dtype=torch.float64)
    torch.testing.assert_close(smooth, expected)


def test_regression_by_hand():
    loss, count = per_example_loss(torch.tensor([[1.0, 3.0], [0.0, -2.0]]), torch.zeros(2, 2), "regression")
    assert loss.tolist() == [5.0, 2.0] and count.tolist() == [1, 1]
    column, row = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 1, 1])
    for logits, labels in [(column, row), (column.squeeze(1), row), (column.squeeze(1), row.unsqueeze(1))]:
        loss, _ = per_example_loss(logits, labels, "regression")
        assert loss.tolist() == [0.0, 1.0, 9.0]


def _tokens(seed=0, shape=(3, 7), vocab=11):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    labels = _tokens()
    labels[0, 4:] = -100
    labels[1, :3] = -100
    return transformers.GPT2LMHeadModel(config), {"input_ids": _tokens(), "labels": labels}, "causal"


def _bert(head, num_labels=2, **config):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return head(transformers.BertConfig(vocab_size=11, num_labels=num_labels, **size, **config))


def _bert_mlm():
    labels = _tokens()
    labels[0, 1:] = -100
    return _bert(transformers.BertForMaskedLM), {"input_ids": _tokens(1), "labels": labels}, "masked"


def _bert_tokens():
    labels = _tokens(vocab=4)
    labels[2, :5] = -100
    model = _bert(transformers.BertForTokenClassification, num_labels=4)
    return model, {"input_ids": _tokens(1), "labels": labels}, "token_classification"


def _bert_classes():
    model = _bert(transformers.BertForSequenceClassification, num_labels=4)
    return model, {"input_ids": _tokens(), "labels": torch.tensor([3, 0, 1])}, "classification"


def _bert_regression(outputs):
    model = _bert(transformers.BertForSequenceClassification, num_labels=outputs, problem_type="regression")
    labels = torch.linspace(-2, 2, 3 * outputs).reshape(3, outputs).squeeze(-1)
    return model, {"input_ids": _tokens(), "labels": labels}, "regression"


def _t5():
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    labels = _tokens(2, (3, 5))
    labels[1, 2:] = -100
    return transformers.T5ForConditionalGeneration(config), {"input_ids": _tokens(), "labels": labels}, "seq2seq"


CASES = {
    "gpt2": _gpt2,
    "bert_masked": _bert_mlm,
    "bert_tokens": _bert_tokens,
    "bert_classes": _bert_classes,
    "bert_regression": lambda: _bert_regression(1),
    "bert_regression_2": lambda: _bert_regression(2),
    "t5": _t5,
}
# These models bring logits to float32 before their own loss, so that in float64 it is only that exact.
FLOAT32_LOSS = {"gpt2", "bert_masked", "bert_tokens"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weighted_mean_is_the_models_own_loss(case, dtype):
    torch.manual_seed(0)
    model, inputs, task = CASES[case]()
    model = model.eval().to(dtype)
    if task == "regression":
        inputs["labels"] = inputs["labels"].to(dtype)
    with torch.no_grad():
        outputs = model(**inputs)
    loss, count = per_example_loss(outputs.logits, inputs["labels"], task)
    assert loss.dtype == dtype and loss.shape == count.shape == (3,)
    mean = ((loss * count).sum() / count.sum()).item()
    tolerance = 1e-10 if dtype is torch.float64 and case not in FLOAT32_LOSS else 1e-5
    assert mean == pytest.approx(outputs.loss.item(), rel=tolerance)
    # And each row alone gives what the model says of that row alone.
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        with torch.no_grad():
            assert loss[row].item() == pytest.approx(model(**own).loss.item(), rel=max(tolerance, 1e-5), abs=1e-7)


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_gradients_and_values_are_cross_entropys(task):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (2, 5), generator=generator)
    labels[0, 3] = -100
    loss, count = per_example_loss(logits, labels, task, label_smoothing=0.1)
    mine = torch.autograd.grad((loss * count).sum(), logits)[0]
    used, targets = (logits[:, :-1], labels[:, 1:]) if task == "causal" else (logits, labels)
    reference = F.cross_entropy(used.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="sum")
    assert (loss * count).sum().item() == pytest.approx(reference.item(), rel=1e-10)
    torch.testing.assert_close(mine, torch.autograd.grad(reference, logits)[0], rtol=1e-10, atol=1e-12)


def test_examples_without_a_target_have_no_nan_gradient():
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss, count = per_example_loss(logits, torch.full((2, 4), -100), "causal", label_smoothing=0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and count.tolist() == [0, 0]
    assert logits.grad is not None and logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_upcast(dtype):
    logits = (torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    labels = _tokens(0, (2, 6), 50)
    loss, _ = per_example_loss(logits, labels, "causal")
    reference, _ = per_example_loss(logits.float(), labels, "causal")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)


class _LargeTensors(TorchDispatchMode):
    """Collects the operations that allocate a tensor of at least `numel` entries."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen, self.storages = numel, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.numel:
            if out.untyped_storage().data_ptr() not in self.storages:
                self.storages.add(out.untyped_storage().data_ptr())
                self.seen.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("task", ["causal", "masked"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1), (torch.bfloat16, 2)], ids=str)
def test_only_the_log_probabilities_are_large(task, dtype, allowed):
    logits = torch.randn(2, 8, 32).to(dtype)
    labels = _tokens(0, (2, 8), 32)
    with _LargeTensors(logits[:, 1:].numel()) as large:
        large.storages.add(logits.untyped_storage().data_ptr())
        per_example_loss(logits, labels, task)
    # The CPU's log_softmax converts half precision first; float32 logits, shifted or not, are never copied.
    assert len(large.seen) == allowed, large.seen


@pytest.mark.parametrize(
    "logits, labels, options, message",
    [
        ((2, 3, 4), (2, 3), {"task": "translation"}, "task='translation' is unknown"),
        ((2, 3, 4), (2, 4), {"task": "causal"}, r"shapes \[batch, seq, vocab\].*labels of shape \[2, 4\]"),
        ((2, 4), (2, 1), {"task": "classification"}, r"shapes \[batch, classes\]"),
        ((3, 1), (3, 3), {"task": "regression"}, "needs labels shaped as the logits"),
        ((2, 4), (2,), {"task": "classification", "granularity": "token"}, "has no tokens"),
        ((2, 4), (2,), {"task": "classification", "granularity": "word"}, "granularity='word'"),
        ((2, 4), (2,), {"task": "classification", "label_smoothing": 1.0}, "label_smoothing=1.0"),
        ((2, 1), (2,), {"task": "regression", "label_smoothing": 0.1}, "leave it at 0"),
    ],
)
def test_wrong_input_is_refused(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        per_example_loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64), **options)
