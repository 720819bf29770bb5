"""pruning_curve and its callback: the values by hand, the model bit by bit as it was, figures in the log."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from matrix import ARCHITECTURES
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_efx import TargetedDropoutConfig
from hf_efx.core.model.record import efx_record
from hf_efx.core.results.curves import PruningCurve
from hf_efx.targeted_dropout.curve import PruningCurveCallback, pruning_curve
from hf_efx.targeted_dropout.pruning import prune

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def linear() -> nn.Sequential:
    """y = 1 x1 + 2 x2 + 4 x3 - 8 x4, and a head that passes it on."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 4.0, -8.0]]))  # pyright: ignore
        model[1].weight.fill_(1.0)  # pyright: ignore
    return model


def squared_change(model: nn.Module) -> float:
    """Mean squared change of the output over orthogonal inputs: the squares of the weights that are gone, over 4."""
    whole = torch.tensor([1.0, 2.0, 4.0, -8.0])
    return (model(torch.eye(4))[:, 0] - whole).square().mean().item()


def test_the_curve_of_a_linear_model_by_hand() -> None:
    model = linear()
    curve = pruning_curve(model, squared_change, [0.75, 0, 0.25, 0.5])
    assert curve == PruningCurve(
        ((0.0, 0.0), (0.25, 0.25), (0.5, 1.25), (0.75, 5.25)),
        "loss",
        False,
        {"granularity": "weight", "scope": "column"},
    )
    assert efx_record(model) is None  # nothing was pruned for good
    prune(model, 0.5)
    assert squared_change(model) == curve.at(0.5)


def test_the_metric_is_taken_by_name_and_known_to_be_better_or_worse() -> None:
    for metric, better in (("accuracy", True), ("perplexity", False), ("loss", False)):
        curve = pruning_curve(linear(), lambda model: {f"eval_{metric}": 3.0}, [0.5], metric=metric)  # noqa: B023
        assert curve.values == (3.0,) and curve.higher_is_better is better
    with pytest.raises(ValueError, match="metric='f1' isn't among.*eval_loss"):
        pruning_curve(linear(), lambda model: {"eval_loss": 1.0}, [0.5], metric="f1")


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_bit_by_bit(ending: type[BaseException] | None, granularity: Any) -> None:
    torch.manual_seed(0)
    model = BY_NAME["resnet"].build().train()
    model.resnet.encoder.stages[0].eval()
    with torch.no_grad():  # what looks like zero isn't all the same
        model.resnet.encoder.stages[1].layers[0].layer[0].convolution.weight[0] = -0.0
    batch = BY_NAME["resnet"].batch()
    model(**batch).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes, storages = [m.training for m in model.modules()], [p.data_ptr() for p in model.parameters()]
    seen: list[tuple[bool, float]] = []

    def evaluate(given: Any) -> float:
        zeros = sum(int((p == 0).sum()) for p in given.parameters()) / given.num_parameters()
        seen.append((any(m.training for m in given.modules()), zeros))
        if ending is not None and len(seen) == 3:
            raise ending
        return given(**batch).loss.item()

    state = torch.get_rng_state()
    if ending is None:
        pruning_curve(model, evaluate, [0, 0.3, 0.6, 0.9], granularity=granularity)
    else:
        with pytest.raises(ending):
            pruning_curve(model, evaluate, [0, 0.3, 0.6, 0.9], granularity=granularity)
    assert not any(training for training, _ in seen) and all(a[1] < b[1] for a, b in itertools.pairwise(seen))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert [p.data_ptr() for p in model.parameters()] == storages
    for name, value in model.state_dict().items():
        assert value.cpu().contiguous().numpy().tobytes() == before[name].contiguous().numpy().tobytes(), name
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_what_is_refused_is_refused_before_the_first_evaluation() -> None:
    def never(model: nn.Module) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match=r"fractions=\[0.5, 1.0\]: expected fractions from 0 to below 1"):
        pruning_curve(linear(), never, [0.5, 1.0])
    uneven = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        uneven[0].weight.mul_(1e-3)  # pyright: ignore
    with pytest.raises(ValueError, match="fraction=0.6 with scope='global' would empty '0'"):
        pruning_curve(uneven, never, [0, 0.6], scope="global")


# --- while training


class Reporter(TrainerCallback):
    """Keeps what a reporter such as TensorBoard is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(dict(kwargs["logs"]))


def trainer(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = Dataset.from_dict({name: value.tolist() for name, value in BY_NAME["gpt2"].batch(16).items()})
    args = TrainingArguments(str(folder), **{**settings, **changes})
    parts = {"data_collator": default_data_collator, "callbacks": list(callbacks)}
    return Trainer(BY_NAME["gpt2"].build(), args, train_dataset=data, eval_dataset=data, **parts)


NAMES = ["eval_loss_pruned_50", "eval_loss_pruned_90", "eval_loss_pruned_area"]


def test_the_callback_logs_the_curve_and_training_is_as_without(tmp_path: Path) -> None:
    reporter = Reporter()
    plain, with_curve = trainer(tmp_path / "plain"), trainer(tmp_path / "curve", reporter)
    callback = PruningCurveCallback(with_curve, [0.5, 0.9])
    with_curve.add_callback(callback)
    for one in (plain, with_curve):
        one.train()
    state = plain.model.state_dict()  # pyright: ignore
    assert all(torch.equal(v, state[k]) for k, v in with_curve.model.state_dict().items())  # pyright: ignore
    rows = [row for row in with_curve.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4] == list(callback.curves)
    assert [{name: row[name] for name in NAMES} for row in rows] == [
        c.figures("eval_") for c in callback.curves.values()
    ]
    assert len([row for row in with_curve.state.log_history if NAMES[0] in row]) == 2  # no rows of their own
    assert [row["step"] for row in reporter.seen if NAMES[0] in row] == [2, 4]
    # The figures are those of the pruned model.
    metrics = with_curve.evaluate()
    prune(with_curve.model, 0.5)  # pyright: ignore
    pruned = with_curve.predict(with_curve.eval_dataset, metric_key_prefix="eval").metrics  # pyright: ignore
    assert pruned["eval_loss"] == metrics["eval_loss_pruned_50"] == rows[-1]["eval_loss_pruned_50"]  # pyright: ignore


def test_a_run_can_choose_its_checkpoint_by_the_pruned_model(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 5.0, 6.0, 7.0])
    curve = PruningCurveCallback(lambda model: {"loss": next(values)}, [0.9], scope="layer")
    run = trainer(
        tmp_path,
        curve,
        EarlyStoppingCallback(early_stopping_patience=2),
        max_steps=10,
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss_pruned_90",
        greater_is_better=False,
    )
    run.train()
    assert run.state.best_metric == 2.0 and run.state.best_global_step == 4 and run.state.global_step == 8
    assert curve.curves[4].settings["scope"] == "layer"


def test_the_trainer_s_own_evaluation_as_the_function(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    curve = PruningCurveCallback(lambda model: run.evaluate(), [0, 0.5])
    run.add_callback(curve)
    run.train()
    rows = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert curve.curves[2].values == (rows[0], rows[2]) and rows[0] == rows[1]


def test_a_second_run_draws_its_own_curves(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, learning_rate=1e-1)
    callback = PruningCurveCallback(run, [0.5])
    run.add_callback(callback)
    found = []
    for steps in (4, 2):  # the second goes on from the first one's weights
        run.args.max_steps = steps
        run.train()
        found.append(dict(callback.curves))
    assert [list(curves) for curves in found] == [[2, 4], [2]] and found[0][2] != found[1][2]
    metrics = run.evaluate()
    assert metrics["eval_loss_pruned_50"] == callback.curves[2].at(0.5)


def test_what_cannot_be_drawn_is_refused_before_the_first_step(tmp_path: Path) -> None:
    other = trainer(tmp_path, max_steps=2)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (lambda run: run, {"target_modules": ["nowhere"]}, "nowhere"),
        (lambda run: other, {}, "has another model than the one that is trained"),
        (lambda run: run, {"granularity": "unit", "config": TargetedDropoutConfig()}, "stands beside config"),
    ]
    for evaluate, options, words in cases:
        run = trainer(tmp_path, max_steps=2)
        run.add_callback(PruningCurveCallback(evaluate(run), [0.5], **options))
        with pytest.raises(ValueError, match=words):
            run.train()
        assert run.state.global_step == 0
    run = trainer(tmp_path, max_steps=2)
    run.add_callback(PruningCurveCallback(run, [0.5]))
    run.eval_dataset = {"a": run.eval_dataset}  # pyright: ignore
    with pytest.raises(ValueError, match="no single evaluation set. Pass a function"):
        run.train()
    assert run.state.global_step == 0
    with pytest.raises(ValueError, match=r"fractions=\[1.0\]"):
        PruningCurveCallback(run, [1.0])
