"""Nothing is silent: the five rules, over every method that the registry has.

A new method joins with a line in `CASES`; without one the first test fails. A case is the method's cheapest training
run, under the Trainer that its users take. What the rules ask of programs stands in
tests/programs/test_every_program.py, of all model classes in tests/core/scoring/test_own_loss.py, of all architectures
in tests/test_matrix.py.
"""

import copy
import functools
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from goldiprox.tiny import (
    BERT,
    arguments,
    assert_equal_weights,
    data,
    draw,
    ids_of,
    irreducible_losses,
    model,
    sequence,
)
from matrix import METHOD_ROWS, training_step
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerCallback

from hf_efx import (
    EfxArguments,
    EfxTrainer,
    GoldiProxTrainer,
    LowRankArguments,
    LowRankTrainer,
    PrunabilityCallback,
    ReplayTrainer,
    RHOLossArguments,
    RHOLossTrainer,
    get_efx_model,
)
from hf_efx.core.model.record import config_class, efx_record
from hf_efx.core.scoring.scorer import Scorer
from hf_efx.registry import METHODS

STEPS, ROWS = 2, 4


def with_method(name: str) -> dict[str, Any]:
    """A model with a method on it, and the callbacks that go along."""
    row = METHOD_ROWS[name]
    return {"model": get_efx_model(model(), row["config"]()), "callbacks": row.get("callbacks", list)()}


@dataclass(frozen=True, eq=False)
class Case:
    """A method's cheapest run.

    Attributes:
        method: Its name in the registry.
        trainer: The class that trains it.
        parts: Makes what the Trainer takes beside arguments and data, the model included.
        arguments: The class of its arguments.
        options: Those that it needs.
        run: Trains, from a checkpoint or from the start.
        refuses: What of `OVERRIDES` it can't go along with, and the error's words.
        rows: Examples that it draws for a step.
    """

    method: str
    trainer: Any
    parts: Callable[[], dict[str, Any]] = lambda: {"model": model()}
    arguments: Any = EfxArguments
    options: dict[str, Any] = field(default_factory=dict)
    run: Callable[[Any, Any], Any] = lambda trainer, resume: trainer.train(resume)
    refuses: dict[str, str] = field(default_factory=dict)
    rows: int = ROWS

    def make(self, folder: Path, cls: Any = None, parts: dict[str, Any] | None = None, **options: Any) -> Any:
        """Its Trainer, with a class and parts of one's own."""
        fixed = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, **self.options, **options}
        given: dict[str, Any] = {"args": arguments(folder, self.arguments, **fixed), "train_dataset": data()}
        given |= {"eval_dataset": data().select(range(8)), **self.parts(), **(parts or {})}
        return (cls or self.trainer)(**given)


SELECTING: dict[str, Any] = {
    "arguments": RHOLossArguments,
    "options": {"selection_ratio": 0.25},
    "refuses": {
        **dict.fromkeys(("loss", "loss function"), "check_scored_loss=False"),
        "batches": "nothing was chosen for step 0",
    },
    "rows": 4 * ROWS,
}
LOW_RANK: dict[str, Any] = {"method": "low_rank", "trainer": LowRankTrainer, "arguments": LowRankArguments}


def low_rank() -> dict[str, Any]:
    """A dense model, and how it is to be factorised."""
    return {"model": model(), "low_rank_config": METHOD_ROWS["low_rank"]["config"]()}


def selecting() -> dict[str, Any]:
    """A model, and what it selects by."""
    return {"model": model(), "irreducible_losses": irreducible_losses()}


def measured() -> dict[str, Any]:
    """A model that is measured at each evaluation."""
    return {"model": model(), "callbacks": [PrunabilityCallback(data().select(range(8)))]}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
CASES = {
    "low_rank": Case(**LOW_RANK, parts=low_rank),
    "low_rank, dense first": Case(**LOW_RANK, parts=low_rank, options={"dense_warmup_steps": 1}),
    "slice_out": Case("slice_out", EfxTrainer, lambda: with_method("slice_out")),
    "targeted_dropout": Case("targeted_dropout", EfxTrainer, lambda: with_method("targeted_dropout")),
    "rho_loss": Case("rho_loss", RHOLossTrainer, selecting, **SELECTING),
    "goldiprox, selecting": Case(
        "goldiprox", GoldiProxTrainer, selecting, run=lambda t, resume: t.select(t.args.max_steps, resume), **SELECTING
    ),
    "goldiprox, replaying": Case(
        "goldiprox",
        ReplayTrainer,
        lambda: {"model": model(), "sequence": sequence(draw(6, ROWS))},
        refuses={"loader": "get_train_dataloader of Own gives another loader", "sampler": "_get_train_sampler of Own"},
    ),
    "prunability": Case(
        "prunability", EfxTrainer, measured, options=EVALUATED, refuses={"loss function": "the model"}
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_method_that_trains_says_how_it_is_made() -> None:
    assert {case.method for case in CASES.values()} | {"mc_dropout"} == {n for n, m in METHODS.items() if m.program}


class Watch(TrainerCallback):
    """Counts optimizer steps, and keeps the ids of the rows that are trained on."""

    def __init__(self) -> None:
        self.steps, self.ids = 0, list[int]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def keep(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            self.ids.extend(ids_of(kwargs))


def outcome(case: Case, make: Callable[[], Any], resume: Any = None) -> Any:
    """The Trainer after its run, with `watch`; or the error, which must have come before its first step."""
    watch = Watch()
    try:
        trainer = make()
        trainer.add_callback(watch)
        with trainer.model.register_forward_pre_hook(watch.keep, with_kwargs=True):
            case.run(trainer, resume)
    except (ValueError, ImportError, TypeError) as error:
        assert watch.steps == 0, f"at step {watch.steps}: {error}"
        return error
    trainer.watch = watch
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Any]:
    """A case's run as it is, made once."""
    return functools.cache(lambda case: outcome(case, lambda: case.make(tmp_path_factory.mktemp("plain"))))


# --- 1. What is asked for acts, or the run is refused before its first step.


class OwnLoss:
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return (2 * found[0], found[1]) if isinstance(found, tuple) else 2 * found


class OwnLoader:
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(data().select(range(ROWS)).with_format("torch"), batch_size=ROWS)  # pyright: ignore


class OwnBatches:
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        return [{name: values[:1] for name, values in batch.items()} for batch in batches], None


class OwnSampler:
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(data())  # pyright: ignore[reportArgumentType]


class OwnOptimizer:
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer: Any = getattr(self, "optimizer", None) or torch.optim.SGD(self.model.parameters(), lr=0.1)  # type: ignore
        return self.optimizer


def twice(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss of one's own."""
    return 2 * torch.nn.functional.cross_entropy(outputs.logits, labels)


def is_doubled(run: Any, plain: Any, case: Case) -> bool:
    return losses(run)[0] == pytest.approx(2 * losses(plain)[0])


def sees_the_first_rows(run: Any, plain: Any, case: Case) -> bool:
    known = set(data()["example_id"][: case.rows])
    return set(run.watch.ids[:ROWS]) <= known and not set(plain.watch.ids[:ROWS]) <= known


# What the user may have changed, and how that shows in a run.
OVERRIDES: dict[str, tuple[type, dict[str, Any], Callable[[Any, Any, Case], bool]]] = {
    "loss": (OwnLoss, {}, is_doubled),
    "loss function": (object, {"compute_loss_func": twice}, is_doubled),
    "loader": (OwnLoader, {}, lambda run, plain, case: set(run.watch.ids) <= set(data()["example_id"][:ROWS])),
    "batches": (OwnBatches, {}, lambda run, plain, case: len(run.watch.ids) == STEPS),
    "sampler": (OwnSampler, {}, sees_the_first_rows),
    "optimizer": (OwnOptimizer, {}, lambda run, plain, case: type(run.optimizer.optimizer) is torch.optim.SGD),
}


@pytest.mark.parametrize("changed", OVERRIDES)
@every_case
def test_what_a_user_overrides_acts_or_is_refused(case: Case, changed: str, plain: Any, tmp_path: Path) -> None:
    own, parts, acts = OVERRIDES[changed]
    cls = type("Own", (case.trainer,) if own is object else (own, case.trainer), {})
    found = outcome(case, lambda: case.make(tmp_path, cls, parts))
    if words := case.refuses.get(changed):
        assert isinstance(found, ValueError) and words in str(found)
    else:
        assert not isinstance(found, Exception) and acts(found, plain(case), case)


@pytest.mark.parametrize(
    "options", [{"max_steps": 1, "seed": 3, "learning_rate": 0.1}, {"per_device_train_batch_size": 2}]
)
@every_case
def test_arguments_changed_later_act_as_if_made_with(
    case: Case, options: dict[str, Any], plain: Any, tmp_path: Path
) -> None:
    def changed() -> Any:
        trainer = case.make(tmp_path / "changed")
        vars(trainer.args).update(options)
        return trainer

    later, made = outcome(case, changed), outcome(case, lambda: case.make(tmp_path / "made", **options))
    if isinstance(made, Exception):
        assert str(later) == str(made)
        return
    assert_equal_weights(later, made)
    assert losses(later) != losses(plain(case))[: len(losses(later))] or case.trainer is ReplayTrainer


# --- 2. What is scored is what is trained.


def eight_rows() -> dict[str, torch.Tensor]:
    """A batch."""
    rows = data().select(range(8)).with_format("torch")
    return {name: rows[name][:] for name in ("input_ids", "labels")}  # pyright: ignore[reportReturnType]


@every_case
def test_scores_are_the_models_own_loss(case: Case, plain: Any) -> None:
    model = plain(case).model.eval()
    with torch.no_grad():
        own, scored = model(**eight_rows()).loss, Scorer(["loss"])(model, eight_rows())["loss"]
    torch.testing.assert_close(scored.mean(), own)
    if case.method == "prunability":
        callback = next(c for c in plain(case).callback_handler.callbacks if isinstance(c, PrunabilityCallback))
        assert callback.results[-1][1].loss == pytest.approx(own.item())


# --- 3. What was saved, copied or kept as best is what comes back.


def assert_same(one: Any, other: Any) -> None:
    """The same weights, bit for bit, and the same methods."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert efx_record(one) == efx_record(other)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@every_case
def test_a_copy_is_the_model_and_trains_as_it_does(case: Case, copied: Any, plain: Any) -> None:
    model = plain(case).model
    twin = copied(model)
    assert twin is not model and type(twin) is type(model)
    assert_same(twin, model)
    found = []
    for one in (model, twin):
        with training_step(one, 1):
            found.append(one(**eight_rows()).loss)
    assert torch.equal(*found)


def loaded(folder: Path) -> Any:
    """A checkpoint's model, its methods put back."""
    model = BERT.auto.from_pretrained(folder)
    return get_efx_model(model) if efx_record(model) else model


@every_case
def test_what_is_saved_is_what_was_trained(case: Case, plain: Any, tmp_path: Path) -> None:
    plain(case).save_model(tmp_path)
    assert_same(loaded(tmp_path), plain(case).model)


@every_case
def test_the_best_model_is_that_of_its_checkpoint(case: Case, tmp_path: Path) -> None:
    options = {f"{kind}_strategy": "steps" for kind in ("eval", "save")} | {"eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "turn", "greater_is_better": False}
    turns = itertools.count()  # the first is the best
    parts = {"compute_metrics": lambda _: {"turn": next(turns)}}
    run = outcome(case, lambda: case.make(tmp_path, None, parts, max_steps=3, **options))
    found = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = run.state.best_global_step
    assert best == 1 + case.options.get("dense_warmup_steps", 0)  # a dense one fits no more
    assert_same(loaded(tmp_path / f"checkpoint-{best}"), run.model)
    assert run.evaluate()["eval_loss"] == pytest.approx(found[best])


@every_case
def test_parts_used_again_give_the_same_run(case: Case, plain: Any, tmp_path: Path) -> None:
    parts = {**case.parts(), "args": case.make(tmp_path).args}
    for _ in range(2):
        run = outcome(case, lambda: case.make(tmp_path, parts={**parts, "model": case.parts()["model"]}))
        assert_same(run.model, plain(case).model)


@pytest.mark.parametrize("row", METHOD_ROWS.values(), ids=METHOD_ROWS)
def test_a_config_used_again_makes_the_same_model(row: dict[str, Any]) -> None:
    config = row["config"]()
    before = copy.deepcopy(config)
    assert_same(*(get_efx_model(model(), config) for _ in range(2)))
    assert config == before


# --- 4. What is reported is what ran.


@every_case
def test_the_record_holds_every_field(case: Case, plain: Any) -> None:
    record = efx_record(plain(case).model) or {"methods": []}
    assert [entry["method"] for entry in record["methods"]] == ([case.method] if METHODS[case.method].config else [])
    for entry in record["methods"]:
        assert entry["config"].keys() >= config_class(entry["method"])().method_fields().keys()


@every_case
def test_saving_changes_no_run_and_a_finished_one_trains_no_further_step(
    case: Case, plain: Any, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    saved = outcome(case, lambda: case.make(tmp_path, **options))
    assert_equal_weights(saved, plain(case))
    assert losses(saved) == losses(plain(case))
    resumed = outcome(case, lambda: case.make(tmp_path, **options), True)
    assert resumed.watch.steps == 0 and resumed.state.global_step == STEPS
    assert_same(resumed.model, saved.model)


# --- 5. Nothing dies late.

UNSUPPORTED = [{"lr_scheduler_type": "warmup_stable_decay"}, {"optim": "adamw_bnb_8bit"}, {"optim": "galore_adamw"}]
UNSUPPORTED += [{"fp16": True}]  # which this device may have


@pytest.mark.parametrize("options", UNSUPPORTED, ids=str)
@every_case
def test_what_cannot_work_is_refused_at_the_start(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    found = outcome(case, lambda: case.make(tmp_path, save_strategy="steps", save_steps=1, **options))
    if isinstance(found, Exception):
        assert not list(tmp_path.glob("checkpoint-*"))
    else:
        assert found.state.global_step == STEPS and all(map(math.isfinite, losses(found)))
