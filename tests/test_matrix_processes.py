"""The matrix in other processes: one without hf_efx, and two at once. Each kind is one launch for all rows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ROWS, Row, logits
from two_processes import SWITCH_STEPS, losses, switch_trainer

from hf_efx import get_efx_model, merge_and_unload

HERE = Path(__file__).parent


@pytest.fixture(params=ROWS, ids=lambda row: row.id, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(scope="module")
def plain_process(tmp_path_factory: pytest.TempPathFactory, run_python: Callable[..., str]) -> dict[str, Any]:
    """What a process without hf_efx makes of every row's checkpoints, and what it makes of them after importing it."""
    folder = tmp_path_factory.mktemp("plain")
    jobs = {}
    for row in ROWS:
        model = row.build()
        torch.save(row.architecture.batch(), folder / f"{row.id}.batch")
        torch.save(logits(model, row), folder / f"{row.id}.logits")
        model.save_pretrained(folder / row.id / "efx")
        merge_and_unload(model).save_pretrained(folder / row.id / "merged")
        if row.full_size:  # as many parameters to a layer as it has dense: the nearest to being taken for it
            full = get_efx_model(row.architecture.build(), row.config(**row.full_size))
            full.save_pretrained(folder / row.id / "full_size")
        jobs[row.id] = row.architecture.auto_class
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = """
        import json, sys, torch, transformers
        from pathlib import Path

        folder = Path(sys.argv[1])

        def load(row, auto, kind):
            batch, expected = (torch.load(folder / f"{row}.{name}") for name in ("batch", "logits"))
            try:
                model = getattr(transformers, auto).from_pretrained(folder / row / kind)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            with torch.no_grad():
                found = model(**batch).logits
            return ((found - expected).abs().max() / expected.abs().max()).item()

        jobs = json.loads((folder / "jobs.json").read_text())
        def load_all(row, auto):
            return {kind.name: load(row, auto, kind.name) for kind in (folder / row).iterdir()}

        results = {row: load_all(row, auto) for row, auto in jobs.items()}
        assert "hf_efx" not in sys.modules
        import hf_efx
        for row, auto in jobs.items():
            results[row]["efx, hf_efx imported"] = load(row, auto, "efx")
        print("RESULTS", json.dumps(results))
    """
    output = run_python(program, args=[folder])
    return json.loads(output.partition("RESULTS ")[2])


def test_process_without_hf_efx_stops_at_an_efx_checkpoint(row: Row, plain_process: dict[str, Any]) -> None:
    if not row.changes_skeleton:
        assert plain_process[row.id]["efx"] == 0.0
        return
    for kind in ("efx", "full_size"):
        assert "mismatch" in str(plain_process[row.id][kind]), plain_process[row.id][kind]


def test_process_without_hf_efx_loads_a_merged_checkpoint(row: Row, plain_process: dict[str, Any]) -> None:
    assert plain_process[row.id]["merged"] < 1e-5


def test_hf_efx_can_be_imported_after_transformers(row: Row, plain_process: dict[str, Any]) -> None:
    assert plain_process[row.id]["efx, hf_efx imported"] == 0.0


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of tests/two_processes.py: all rows in one launch."""
    folder = tmp_path_factory.mktemp("two")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(folder)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results = json.loads((folder / "results.json").read_text())
    assert results["processes"] == 2
    return results


def test_two_processes_equal_one(row: Row, two_processes: dict[str, Any]) -> None:
    assert two_processes["apart"][row.id] > 1e-3  # each half alone leads elsewhere
    assert two_processes["ddp"][row.id] < 1e-10
    found = two_processes["fsdp"][row.id]
    assert found < 1e-10 if row.fsdp else "is sharded (FSDP" in found
    if row.by_peft:
        assert two_processes["peft"][row.id] < 1e-10


def test_the_best_model_comes_back_under_ddp(two_processes: dict[str, Any]) -> None:
    assert two_processes["best_model_lost"] == 0


def test_factor_decay_under_fsdp_equals_one_process(two_processes: dict[str, Any]) -> None:
    assert two_processes["fsdp_decay"] < 1e-10


def test_what_slices_do_to_the_average_of_gradients(two_processes: dict[str, Any]) -> None:
    own, same = (two_processes["own_slices"][name] for name in ("own", "same"))
    assert own["difference"] < 1e-10 and same["difference"] < 1e-10
    assert (
        same["units"] == 64 < own["units"] <= 128
    )  # half of 128 hidden units, and more where two slices are averaged


def test_factorised_from_the_start_in_two_processes(two_processes: dict[str, Any], tmp_path: Path) -> None:
    single = switch_trainer(tmp_path, dense_warmup_steps=0, gradient_accumulation_steps=2)
    single.train()
    assert len(losses(single)) == SWITCH_STEPS
    assert losses(single) == pytest.approx(two_processes["from_start"], rel=1e-5)


def test_switch_in_two_processes(two_processes: dict[str, Any], tmp_path: Path) -> None:
    switch = two_processes["switch"]
    assert switch["ranks_identical"] and len(switch["factorised"]) == 8
    assert len(switch["losses"]) == SWITCH_STEPS
    assert switch["resumed"] == switch["losses"]
    single = switch_trainer(tmp_path, gradient_accumulation_steps=2)  # the same two batches to a step
    single.train()
    assert losses(single) == pytest.approx(switch["losses"], rel=1e-5)
