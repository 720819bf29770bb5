"""Selection in two processes: both choose as one would, or each for itself. One launch for all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_efx.rho_loss.exchange import union_order
from hf_efx.rho_loss.irreducible_table import load_irreducible_losses, save_irreducible_losses
from rho_loss.runs import logs, standard_table
from rho_loss.test_irreducible import compute
from rho_loss.texts import table, text_trainer
from rho_loss.two_processes import KINDS, STEPS, TEXT, make, vector

HERE = Path(__file__).parent

GLOBAL = [kind for kind in KINDS if kind.startswith("global")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """The results of each process."""
    save_irreducible_losses(standard_table(), folder / "table")
    for side in ("left", "right"):
        save_irreducible_losses(table(side=side), folder / f"{side}-table")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(folder)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results = [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]
    assert [result["processes"] for result in results] == [2, 2]
    return results


def together(both: list[dict[str, Any]], kind: str, parts: int = 1) -> list[list[int]]:
    """Each step's ids as one process with the whole batch has them: by micro-batch, and in it by process."""
    steps = []
    for ids in zip(*(result[kind]["ids"] for result in both), strict=True):
        size = len(ids[0]) // parts
        steps.append([i for part in range(parts) for mine in ids for i in mine[part * size : (part + 1) * size]])
    return steps


def test_draws_lie_as_in_one_process() -> None:
    """Two processes' draws of 2 rows and of 1: a draw after the other, and in each a process after the other."""
    rank_of, row_of = union_order([2, 1], 2)
    assert rank_of.tolist() == [0, 0, 1, 1, 0, 1] and row_of.tolist() == [0, 1, 0, 1, 2, 2]


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_scope_equals_one_process_with_the_whole_batch(
    kind: str, both: list[dict[str, Any]], tmp_path: Path
) -> None:
    single = make(tmp_path, kind, size=8)
    single.train()
    accumulation = KINDS[kind].get("gradient_accumulation_steps", 1)
    assert together(both, kind, accumulation) == [single.ids[step] for step in range(STEPS)]
    expected = vector(single.model)
    moved = (expected - vector(make(tmp_path, kind).model)).norm()
    for result in both:
        assert result[kind]["alike"]
        difference = torch.tensor(result[kind]["weights"]).double() - expected
        assert difference.abs().max() < 1e-6 and moved > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_are_exchanged(side: str, both: list[dict[str, Any]], tmp_path: Path) -> None:
    single = text_trainer(tmp_path, side, per_device_train_batch_size=4, **TEXT)
    single.train()
    kind = f"text, {side}"
    assert together(both, kind) == [single.ids[step] for step in sorted(single.ids)]
    difference = torch.tensor(both[0][kind]["weights"]).double() - vector(single.model)
    assert difference.abs().max() < 1e-6
    assert both[0][kind]["losses"] == pytest.approx(logs(single, "loss"), rel=1e-4)


@pytest.mark.parametrize("kind", ["process", "scoring model"])
def test_process_scope_trains_as_many_rows_on_each(kind: str, both: list[dict[str, Any]]) -> None:
    for step in range(8):  # one epoch
        first, second = (result[kind]["ids"][step] for result in both)
        assert len(first) == len(second) == 4 and not set(first) & set(second)
    assert together(both, kind) != together(both, "global")
    assert all(result[kind]["alike"] for result in both)


def test_the_scoring_model_is_the_same_everywhere(both: list[dict[str, Any]]) -> None:
    assert all(result["scoring model"]["scoring alike"] for result in both)


def test_resume_in_the_middle_of_a_cycle(both: list[dict[str, Any]]) -> None:
    for result in both:
        whole = result["global, cycle"]
        assert result["resumed"]["ids"] == whole["ids"][3:]
        assert result["resumed"]["weights"] == whole["weights"]


def test_both_share_the_work_of_a_table(both: list[dict[str, Any]], folder: Path) -> None:
    found = [result["shared table"] for result in both]
    assert [(each["rows"], each["scored"]) for each in found] == [(50, 30), (50, 20)]  # five shards of 10 rows
    assert all("several processes need one" in each["refusal"] for each in found)
    assert load_irreducible_losses(folder / "shared")[:] == compute()[:]


def test_the_report_is_of_both(both: list[dict[str, Any]], tmp_path: Path) -> None:
    single = make(tmp_path, "global", size=8)
    single.train()
    figures = logs(single, "rho_loss/corrupted_share")
    assert both[0]["global"]["corrupted"] == pytest.approx(figures) and len(set(figures)) > 2
    assert set(both[0]["global"]["overlap"]) == {0.0}
