"""What scoring must leave as it was: the model, its wrappers, the random states."""

import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scoring_cases import CASES
from torch import nn

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.scorer import Scorer
from hf_efx.core.scoring.scoring_state import scoring_state, untouched
from hf_efx.core.training.step_context import StepContext


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Normed(nn.Module):
    """Dropout, batch statistics and a frozen part that stays in eval; takes its labels, or fails, as it is told."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.gradient_checkpointing = True
        self.context = StepContext(0)
        self.seen, self.fail = [], False

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x, labels=None):
        self.seen.append(
            SimpleNamespace(
                training=self.training,
                norm=self.norm.training,
                frozen=self.frozen.training,
                checkpointing=self.gradient_checkpointing,
                draws=self.context.active,
                grad=torch.is_grad_enabled(),
            )
        )
        self.calls = self.calls + 1  # a buffer that is replaced, not changed in place
        random.random(), np.random.rand()
        logits = self.head(self.dropout(self.frozen(self.norm(x))))
        if self.fail:
            raise RuntimeError("told to fail")
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


def _everything(model):
    return {
        "weights": [parameter.clone() for parameter in model.parameters()],
        "grads": [parameter.grad.clone() for parameter in model.parameters()],
        "buffers": [(id(buffer), buffer.clone()) for buffer in model.buffers()],
        "flags": [module.training for module in model.modules()],
        "checkpointing": model.gradient_checkpointing,
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    }


def _assert_same(before, after):
    assert before.keys() == after.keys()
    for name in ("weights", "grads"):
        assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
    for (identity, value), (other, now) in zip(before["buffers"], after["buffers"], strict=True):
        assert identity == other and torch.equal(value, now)
    assert before["flags"] == after["flags"] and before["checkpointing"] == after["checkpointing"]
    assert before["random"] == after["random"]


@pytest.mark.parametrize("fail", [False, True], ids=["", "exception"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("mode", ["eval", "train", "dropout"])
def test_nothing_is_left_behind(mode, training, fail):
    model = Normed().train(training)
    batch = {"x": torch.randn(8, 4), "labels": torch.randint(0, 3, (8,))}
    model(**batch)[0].backward()
    model.norm.eval()  # a flag that is not its model's
    model.context.begin_step(0)
    before, model.fail = _everything(model), fail
    quantities = ("bald",) if mode == "dropout" else ("loss", "grad_norm")
    scorer = Scorer(quantities, task="classification", mode="train" if mode == "train" else "eval", batch_size=4)
    scorer._checked.add(model)  # the comparison with its own loss comes first, in evaluation mode
    model.seen.clear()
    if fail:
        with pytest.raises(RuntimeError, match="told to fail"):
            scorer(model, batch)
    else:
        scorer(model, batch)
    seen = model.seen[0]
    assert (seen.training, seen.norm) == {"eval": (False, False), "train": (True, True), "dropout": (True, False)}[
        mode
    ]
    assert not (seen.frozen or seen.checkpointing or seen.draws or seen.grad)
    _assert_same(before, _everything(model))
    assert model.context.active and model.gradient_checkpointing


def test_train_mode_scores_as_a_training_step_would():
    model, batch, _ = CASES["gpt2 right"][1]()
    state = torch.get_rng_state()
    own = model.train()(**batch).loss
    torch.set_rng_state(state)
    # One chunk, and no column that the batch could spare: the masks are those of the forward above.
    batch["attention_mask"][1] = 1
    batch["labels"][1] = torch.cat([batch["labels"][1, :7], torch.tensor([-100, -100])])
    scores = Scorer(("loss", "count"), mode="train")(model, batch)
    mean = (scores["loss"] * scores["count"]).sum() / scores["count"].sum()
    assert mean.item() == pytest.approx(own.item(), rel=1e-5)
    assert Scorer()(model, batch)["loss"].sub(scores["loss"]).abs().max() > 1e-4


def test_gradient_checkpointing_is_off_inside_and_back_on_afterwards():
    model, batch, _ = CASES["gpt2 right"][1]()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # checkpointing without gradients warns
        Scorer(mode="train")(model, batch)
    assert model.is_activation_checkpointing


def test_scoring_inside_an_autocast_region_leaves_its_training_step_alone():
    model = nn.Linear(4, 3)
    batch = {"x": torch.randn(8, 4), "labels": torch.randint(0, 3, (8,))}

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    with torch.autocast("cpu", torch.bfloat16):
        Scorer(task="classification")(Wrapped(), batch)
        loss = F.cross_entropy(model(batch["x"]).float(), batch["labels"])
    loss.backward()
    assert model.weight.grad is not None and model.weight.grad.abs().sum() > 0


def test_wrappers_are_looked_through(tmp_path):
    model, batch, _ = CASES["gpt2 left"][1]()
    expected = Scorer()(model, batch)["loss"]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        compiled = torch.compile(parallel, backend="eager")
        assert unwrap_model(compiled) is model  # pyright: ignore[reportArgumentType]
        reducer_calls = []
        parallel.register_forward_hook(lambda *_: reducer_calls.append(1))
        assert torch.equal(Scorer()(compiled, batch)["loss"], expected)  # pyright: ignore[reportArgumentType]
        assert not reducer_calls
        # The next training step is an ordinary one.
        parallel(**batch).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


class Growing(nn.Module):
    """Replaces a buffer when a batch is longer than all before, and notes the length: as dynamic RoPE does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(1))
        self.longest = torch.tensor(1)

    def forward(self, x):
        if x.shape[1] > self.longest:
            self.register_buffer("table", torch.full((1,), x.shape[1]))
            self.longest, self.since = torch.tensor(x.shape[1]), 0
        return self.table * x


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_replaced_buffer_goes_back_with_its_books(mode):
    model = Growing().train()
    table, longest = model.table, model.longest
    with scoring_state(model, mode):
        assert model(torch.ones(1, 4)).sum() == 16
    assert model.table is table and model.longest is longest and "since" not in vars(model)
    assert model.training and model(torch.ones(1, 1)).sum() == 1


def test_scoring_state_can_be_used_alone():
    model = Normed().train()
    with scoring_state(model):
        assert not model.dropout.training and not torch.is_grad_enabled()
    assert model.dropout.training and torch.is_grad_enabled()


class Shared(nn.Module):
    table: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(2))
        self.inner = nn.Module()
        self.inner.register_buffer("table", self.table)


def test_untouched_leaves_gradients_on_and_shared_buffers_shared():
    model = Shared().eval()
    table, state = model.table, torch.get_rng_state()
    with untouched(model):
        model.train()
        model.table += torch.rand(2)
        assert model.inner.table is model.table and model.table is not table and torch.is_grad_enabled()
    assert model.table is table and model.inner.table is table and table.tolist() == [1, 1]
    assert not model.training and torch.equal(torch.get_rng_state(), state)
    with scoring_state(model, copy_buffers=True):
        model.table += 1
    assert table.tolist() == [1, 1]
