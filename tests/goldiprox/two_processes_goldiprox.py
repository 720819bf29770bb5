"""Everything that test_two_processes.py asks of two processes, in one launch; see tests/two_processes.py.

The first process writes FOLDER/results.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))

from two_processes import Kill

from goldiprox.tiny import draw, proxy, replay, sequence, weights
from hf_efx.programs.frame import end_processes

SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
SELECTING = {"per_device_train_batch_size": 2, "optim": "sgd", "selection_scope": "global", "save_steps": 2}


def gathered(value: Any) -> list[Any]:
    """Every process' value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def vector(trainer: Any) -> torch.Tensor:
    """All parameters, end to end."""
    return torch.cat([value.flatten() for value in weights(trainer).values()])


def replays(folder: Path) -> dict[str, Any]:
    """A replay without a break, with a short last step, and one that is killed and resumed."""
    ids = draw(last=5)
    options = {**SPLIT, "save_strategy": "steps", "save_steps": 2}
    whole = replay(folder / "whole", sequence(ids), **options)
    whole.train()
    killed = replay(folder / "killed", sequence(ids), **options)
    killed.add_callback(Kill(3))
    try:
        killed.train()
    except KeyboardInterrupt:
        pass
    resumed = replay(folder / "killed", sequence(ids), **options)
    resumed.train(resume_from_checkpoint=True)
    if whole.is_world_process_zero():
        torch.save(vector(whole), folder / "replay.pt")
    return {
        "seen": gathered(whole.seen),
        "seen_again": gathered(resumed.seen),
        "ranks_identical": all(torch.equal(each, vector(whole)) for each in gathered(vector(whole))),
        "resumed_identical": gathered(torch.equal(vector(whole), vector(resumed))),
    }


def selections(folder: Path) -> dict[str, Any]:
    """A selection over both processes, one that is killed and resumed, and the replay of its own trace."""
    options = {**SELECTING, "save_strategy": "steps", "gradient_accumulation_steps": 3}
    live = proxy(folder / "select", **options)
    trace = live.select(5)
    killed = proxy(folder / "select_killed", **options)
    killed.add_callback(Kill(3))
    try:
        killed.select(5)
    except KeyboardInterrupt:
        pass
    resumed = proxy(folder / "select_killed", **options).select(5, resume_from_checkpoint=True)
    again = replay(folder / "again", trace, per_device_train_batch_size=2, gradient_accumulation_steps=3, optim="sgd")
    again.train()
    try:
        proxy(folder / "refused", **{**SELECTING, "selection_scope": "process"}).select(2)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {
        "steps": [row["example_ids"] for row in trace.dataset],
        "digests": gathered(trace.digest),
        "resumed": gathered(resumed.digest),
        "replay_identical": gathered(torch.equal(vector(live), vector(again))),
        "refusal": refusal,
    }


def main(folder: Path) -> None:
    """Runs everything and writes the results."""
    accelerator = Accelerator(cpu=True)
    results = {"processes": accelerator.num_processes, "replay": replays(folder), "select": selections(folder)}
    if accelerator.is_main_process:
        (folder / "results.json").write_text(json.dumps(results))
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
