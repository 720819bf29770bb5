"""Everything that tests/rho_loss/test_processes.py asks of two processes, in one launch: see tests/two_processes.py.

FOLDER holds the tables of irreducible losses; each process writes what it chose to FOLDER/results-<rank>.json.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from hf_efx.rho_loss import irreducible
from hf_efx.rho_loss.irreducible_table import load_irreducible_losses
from rho_loss.runs import Net, Plain, logs, trainer
from rho_loss.test_irreducible import compute
from rho_loss.texts import text_trainer

# Rows of 4 a process are 8 in all; draws of 10 a process are 20.
KINDS: dict[str, dict[str, Any]] = {
    "global": {"selection_scope": "global", "selection_ratio": 0.4},
    "global, accumulated": {"selection_scope": "global", "selection_ratio": 0.4, "gradient_accumulation_steps": 2},
    "global, cycle": {"selection_scope": "global", "selection_ratio": 0.2, "rescore_every": 2},
    "global, uniform": {"selection_scope": "global", "selection_ratio": 0.4, "selection": "uniform"},
    "global, sampled": {"selection_scope": "global", "selection_ratio": 0.4, "selection": "grad_norm_is"},
    "process": {"selection_ratio": 0.4},
    "scoring model": {"selection_ratio": 0.4, "train_scoring_model": True},
}
# Without Adam, which makes steps out of the rounding of gradients that are zero.
TEXT: dict[str, Any] = {"selection_scope": "global", "optim": "sgd", "learning_rate": 0.5}
STEPS = 9  # an epoch of 8 and one more


def make(folder: Path, kind: str, size: int = 4, seed: int = 0, **options: Any) -> Any:
    """A run, alike on two processes with batches of 4 and on one with batches of 8."""
    settings = {"max_steps": STEPS, "corrupted_column": "wrong", **KINDS[kind], **options}
    if settings.get("train_scoring_model"):
        settings["scoring_model"] = Net(seed=4)
    settings["accelerator_config"] = {"even_batches": True}
    return trainer(folder, Plain(seed), per_device_train_batch_size=size, max_grad_norm=0, **settings)


def vector(model: Any) -> torch.Tensor:
    """All values of a model."""
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def alike(model: Any) -> bool:
    """Whether all processes have the same model."""
    values = vector(model)
    others = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(others, values)
    return all(torch.equal(other, values) for other in others)


def result(run: Any) -> dict[str, Any]:
    """What this process chose, and the weights."""
    return {
        "ids": [run.ids[step] for step in sorted(run.ids)],
        "weights": vector(run.model).tolist(),
        "losses": logs(run, "loss"),
        "alike": alike(run.model),
        "overlap": logs(run, "rho_loss/rank_overlap"),
        "corrupted": logs(run, "rho_loss/corrupted_share"),
    }


def resumed(folder: Path, losses: Any) -> dict[str, Any]:
    """The cycle's run, gone on with from its middle."""
    options = {"irreducible_losses": losses}
    make(folder, "global, cycle", save_strategy="steps", save_steps=3, **options).train()
    run = make(folder, "global, cycle", seed=1, **options)
    run.train(str(folder / "checkpoint-3"))
    return result(run)


def shared_table(folder: Path) -> dict[str, Any]:
    """A table that both processes make: its rows, how many this one scored, the refusal of a call without a folder."""
    finish, scored = irreducible._losses, []

    def record(scores: Any, ids: Any) -> Any:
        scored.extend(ids)
        return finish(scores, ids)

    irreducible._losses = record
    try:
        compute()
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    table = compute(output_dir=folder)
    irreducible._losses = finish
    return {"rows": len(table), "scored": len(scored), "refusal": refusal}


def main(folder: Path) -> None:
    """Runs everything and writes the results."""
    accelerator = Accelerator(cpu=True)
    results: dict[str, Any] = {"processes": accelerator.num_processes}
    results["shared table"] = shared_table(folder / "shared")
    losses = load_irreducible_losses(folder / "table")
    for kind in KINDS:
        run = make(folder / kind, kind, irreducible_losses=losses)
        run.train()
        results[kind] = result(run)
        if run.scoring_model is not None:
            results[kind]["scoring alike"] = alike(run.scoring_model)
    results["resumed"] = resumed(folder / "resumed", losses)
    for side in ("left", "right"):
        losses = load_irreducible_losses(folder / f"{side}-table")
        options = {**TEXT, "per_device_train_batch_size": 2, "irreducible_losses": losses}
        run = text_trainer(folder / side, side, **options)
        run.train()
        results[f"text, {side}"] = result(run)
    (folder / f"results-{accelerator.process_index}.json").write_text(json.dumps(results))
    run.end()
    # One that outlives its group can keep the process from ending.
    assert not any(type(one) is DistributedDataParallel for one in gc.get_objects())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
