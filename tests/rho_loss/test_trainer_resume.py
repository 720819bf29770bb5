"""Resuming a run that selects: exactly, in the middle of a cycle and with a scoring model that learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_efx.rho_loss.selection import SELECTION_FUNCTIONS
from rho_loss.runs import Net, Plain, assert_same, standard_table, trainer, weights

STEPS = 11  # an epoch of 8 steps, which a cycle of 3 doesn't divide, and three more

KINDS: dict[str, dict[str, Any]] = {
    "cycle": {"rescore_every": 3, "selection_ratio": 4 / 60},  # draws of 20 of 160
    "accumulation": {"rescore_every": 3, "gradient_accumulation_steps": 2, "selection_ratio": 4 / 30},  # of 10
    "scoring model": {"rescore_every": 2, "train_scoring_model": True, "selection_ratio": 0.1, "weight_decay": 0.1},
    "sampled": {"selection": "grad_norm_is", "selection_ratio": 0.2},
}


def make(folder: Path, kind: str, seed: int = 0, **options: Any) -> Any:
    options = {"max_steps": STEPS, "corrupted_column": "wrong", **KINDS[kind], **options}
    if options.get("train_scoring_model"):
        options["scoring_model"] = Net(seed=4 + seed)
    return trainer(folder, Net(seed), **options)


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    run = make(tmp_path_factory.mktemp("whole"), request.param, save_strategy="steps", save_steps=1)
    run.train()
    return request.param, run


def test_it_resumes_bit_for_bit(whole: tuple[str, Any], tmp_path: Path) -> None:
    kind, run = whole
    for step in (1, 2, 7, 8, 10):  # 8 ends the epoch
        resumed = make(tmp_path, kind, seed=1)  # other weights, which the checkpoint's replace
        resumed.train(str(Path(run.args.output_dir, f"checkpoint-{step}")))
        assert resumed.ids == {s: ids for s, ids in run.ids.items() if s >= step}
        assert all(torch.equal(resumed.scores[s], run.scores[s]) for s in resumed.scores)
        assert_same(weights(resumed), weights(run))
        if resumed.scoring_model is not None:
            assert_same(resumed.scoring_model.state_dict(), run.scoring_model.state_dict())
        one, other = (json.loads(Path(r.args.output_dir, "selection_report.json").read_text()) for r in (run, resumed))
        timed = ("loading_seconds", "scoring_seconds", "scoring_time_share", "sums")
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.parametrize("options", [*({"selection": name} for name in SELECTION_FUNCTIONS), {"score_mode": "train"}])
def test_every_selection_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    """Dropout samples of the step after a checkpoint too, in the middle of an epoch (10 steps)."""
    losses = {"irreducible_losses": standard_table(), "max_steps": 5, "mc_samples": 3, **options}
    run = trainer(tmp_path, save_strategy="steps", save_steps=3, **losses)
    run.train()
    resumed = trainer(tmp_path, Net(seed=1), **losses)
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert resumed.ids == {step: run.ids[step] for step in (3, 4)}
    for step in (3, 4):
        torch.testing.assert_close(resumed.scores[step], run.scores[step], rtol=0, atol=0, equal_nan=True)
    assert_same(weights(resumed), weights(run))


def test_what_is_pending_stands_in_the_checkpoint(whole: tuple[str, Any]) -> None:
    kind, run = whole
    cycle, accumulation = run.args.rescore_every, run.args.gradient_accumulation_steps
    for step in range(1, STEPS):
        file = Path(run.args.output_dir, f"checkpoint-{step}", "rho_loss", "pending-0.safetensors")
        left = min(-(-(step % 8) // cycle) * cycle, 8) - step % 8 if kind in ("cycle", "accumulation") else 0
        if kind == "scoring model":
            left = step % 2
        assert file.is_file() == (left > 0)
        if left:
            tensors = load_file(file)
            assert len([name for name in tensors if name.endswith(".ids")]) == left * accumulation


def test_a_scoring_model_learns_and_chooses(tmp_path: Path) -> None:
    """It sees the rows that the model is trained on, and its scores are the ones that choose."""
    scoring = Plain(seed=4)
    before = {name: value.clone() for name, value in scoring.state_dict().items()}
    fixed = trainer(tmp_path, scoring_model=scoring, max_steps=4)
    fixed.train()
    assert_same(scoring.state_dict(), before)
    learning = trainer(tmp_path, scoring_model=scoring, train_scoring_model=True, max_steps=4)
    learning.train()
    assert fixed.ids[0] == learning.ids[0] and fixed.ids != learning.ids
    alone = trainer(tmp_path, max_steps=4)
    alone.train()
    assert alone.ids[0] != fixed.ids[0]
    for name, value in scoring.state_dict().items():
        assert not torch.equal(value, before[name])


def test_a_scoring_model_takes_the_runs_step(tmp_path: Path) -> None:
    """A scoring model equal to the model, on the same batches with the same settings, stays equal to it."""
    scoring = Plain()
    options = {"weight_decay": 0.1, "gradient_accumulation_steps": 2, "warmup_steps": 3}
    run = trainer(tmp_path, Plain(), scoring_model=scoring, train_scoring_model=True, **options)
    run.get_decay_parameter_names = lambda model: [name for name, _ in model.named_parameters()]
    run.train()
    for name, value in weights(run).items():
        torch.testing.assert_close(scoring.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_scoring_leaves_the_runs_random_numbers(tmp_path: Path) -> None:
    """Dropout of a run that selects equals that of one that doesn't, whatever was scored and trained beside it."""
    states = []
    for options in ({"selection": "uniform"}, {"selection": "bald", "mc_samples": 2}, {"score_mode": "train"}):
        kind = {"scoring_model": Net(seed=3), "train_scoring_model": True} if "selection" not in options else {}
        run = trainer(tmp_path, max_steps=3, **options, **kind)
        run.train()
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_a_checkpoint_without_the_scoring_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    run = trainer(tmp_path, max_steps=2, scoring_model=Net(), train_scoring_model=True)
    with pytest.raises(ValueError, match="holds no scoring model, but train_scoring_model=True"):
        run.train(str(tmp_path / "checkpoint-1"))


def test_pending_batches_of_other_processes_are_refused(tmp_path: Path) -> None:
    options = {"rescore_every": 2, "max_steps": 2}
    trainer(tmp_path, save_strategy="steps", save_steps=1, **options).train()
    folder = tmp_path / "checkpoint-1" / "rho_loss"
    shutil.copy(folder / "pending-0.safetensors", folder / "pending-1.safetensors")
    with pytest.raises(ValueError, match="holds the chosen batches of 2 processes, but this run has 1"):
        trainer(tmp_path, **options).train(str(tmp_path / "checkpoint-1"))


def test_a_second_run_begins_anew(tmp_path: Path) -> None:
    """What was pending when the first ended isn't trained on by the second."""
    run = trainer(tmp_path, rescore_every=2, max_steps=3)
    run.train()
    assert run._pending
    first, run.ids, run.seen = run.ids, {}, []
    run.train()
    assert run.ids.keys() == first.keys() and not run.ids[0] == first[3 - 1]
