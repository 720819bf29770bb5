"""Selecting and replaying over two gloo processes: one launch for all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .tiny import draw, proxy, replay, sequence
from .two_processes_goldiprox import SELECTING, SPLIT, vector

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = [str(HERE / "two_processes_goldiprox.py"), str(folder)]
    done = subprocess.run([*command, *script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((folder / "results.json").read_text())
    assert found["processes"] == 2
    return found


def together(seen: list[list[list[int]]], step: int) -> list[int]:
    """A step's ids over both processes: the first micro-batch of each, then the second ones."""
    return [i for micro in (2 * step, 2 * step + 1) for rank in seen for i in rank[micro]]


def test_each_step_s_set_is_preserved(results: dict[str, Any]) -> None:
    seen = results["replay"]["seen"]
    ids = draw(last=5)
    assert [len(rank) for rank in seen] == [12, 12]
    assert [together(seen, step) for step in range(6)] == ids
    assert [len(rank[-2]) for rank in seen] == [2, 1] and [len(rank[-1]) for rank in seen] == [1, 1]


def test_replay_over_two_processes_equals_one(results: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    assert results["replay"]["ranks_identical"]
    single = replay(tmp_path, sequence(draw(last=5)), **{**SPLIT, "gradient_accumulation_steps": 4})
    start = vector(single)
    single.train()
    found = torch.load(folder / "replay.pt")
    assert (found - start).norm() > 1e-2
    assert (found - vector(single)).norm() / (found - start).norm() < 1e-5


def test_resume_inside_the_sequence_over_two_processes(results: dict[str, Any]) -> None:
    assert results["replay"]["resumed_identical"] == [True, True]
    for whole, again in zip(results["replay"]["seen"], results["replay"]["seen_again"], strict=True):
        assert again == whole[4:]


def test_selection_over_two_processes_is_that_of_one(results: dict[str, Any], tmp_path: Path) -> None:
    found = results["select"]
    options = {**SELECTING, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}
    single = proxy(tmp_path, **options).select(5)
    assert found["steps"] == [row["example_ids"] for row in single.dataset]
    assert len(set(found["digests"])) == 1
    assert len({tuple(step) for step in found["steps"]}) == 5


def test_selection_over_two_processes_resumes(results: dict[str, Any]) -> None:
    assert results["select"]["resumed"] == results["select"]["digests"]


def test_replay_of_its_own_trace_over_two_processes(results: dict[str, Any]) -> None:
    assert results["select"]["replay_identical"] == [True, True]


def test_choice_by_process_is_refused(results: dict[str, Any]) -> None:
    assert "selection_scope='process' over 2 processes" in results["select"]["refusal"]
