"""Everything that tests/test_matrix_processes.py asks of two processes, in one launch.

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        tests/two_processes.py FOLDER

starts two gloo workers on CPUs (`--cpu` would silently start one). The first process writes FOLDER/results.json.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from accelerate import Accelerator
from matrix import ROWS, Row
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from hf_efx import (
    EfxArguments,
    EfxTrainer,
    FactorDecayCallback,
    LowRankArguments,
    LowRankConfig,
    LowRankTrainer,
    step_context,
)
from hf_efx.programs.frame import end_processes

STEPS, BATCH = 3, 4
SWITCH_STEPS, SWITCH_AT, KILL_AT = 8, 4, 6


def model_and_optimizer(row: Row, way: str = "memory") -> tuple[Any, torch.optim.Optimizer]:
    """The row's model in float64, and its optimiser. Batch norm keeps its averages: half a batch has others."""
    model: Any = peft.get_peft_model(row.architecture.build(), row.config()) if way == "peft" else row.build()
    model = model.double().train(row.architecture.name != "resnet")
    return model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


def batch(row: Row, step: int, part: slice = slice(None)) -> dict[str, torch.Tensor]:
    """A step's batch in float64, or part of it."""
    values = row.architecture.batch(BATCH, seed=step)
    return {k: (v.double() if v.is_floating_point() else v)[part] for k, v in values.items()}


def train(row: Row, model: Any, optimizer: Any, part: slice, backward: Any) -> None:
    """A few steps."""
    context = step_context(model)  # of methods that draw: alike on all processes, since none tells it its rank
    for step in range(STEPS):
        if context is not None:
            context.begin_step(step)
        backward(model(**batch(row, step, part)).loss)
        optimizer.step()
        optimizer.zero_grad()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def difference(model: Any, row: Row, way: str = "memory") -> float:
    """Largest relative difference of the parameters from those of one process that saw the whole batches."""
    single, optimizer = model_and_optimizer(row, way)
    train(row, single, optimizer, slice(None), torch.Tensor.backward)
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return max(((whole(p.detach()) - q).norm() / (q.norm() + 1e-12)).item() for p, q in pairs)


def largest(value: float) -> float:
    """The largest over the processes."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def apart_difference(row: Row, part: slice) -> float:
    """The difference where each process trains on its half alone: what the other figures must be far below."""
    model, optimizer = model_and_optimizer(row)
    train(row, model, optimizer, part, torch.Tensor.backward)
    return largest(difference(model, row))


def ddp_difference(row: Row, accelerator: Accelerator, part: slice, way: str = "memory") -> float:
    """The difference after training under DistributedDataParallel."""
    model, optimizer = accelerator.prepare(*model_and_optimizer(row, way))
    train(row, model, optimizer, part, accelerator.backward)
    return largest(difference(accelerator.unwrap_model(model), row, way))


def fsdp_difference(row: Row, part: slice) -> float | str:
    """The difference after training under FSDP2, the whole model one unit; the error where a method refuses that."""
    model, _ = model_and_optimizer(row)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if not row.fsdp:
        context: Any = step_context(model)
        try:
            context.begin_step(0)
        except ValueError as error:
            return str(error)
    train(row, model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), part, torch.Tensor.backward)
    return largest(difference(model, row))


def fsdp_decay_difference(row: Row) -> float:
    """The difference after one factor decay under FSDP2, without any gradient, from the same in one process."""
    (model, _), (single, _) = model_and_optimizer(row), model_and_optimizer(row)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for each in (model, single):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        callback: Any = FactorDecayCallback(0.5)
        callback.on_train_begin(None, None, None, model=each, optimizer=optimizer)
        callback.on_pre_optimizer_step(None, None, None, model=each, optimizer=optimizer)
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return largest(max((whole(p.detach()) - q).abs().max().item() for p, q in pairs))


def own_slices(accelerator: Accelerator) -> dict[str, Any]:
    """Slices of each process' own, or the same, under DDP: the gradient against the mean over processes."""
    row = next(row for row in ROWS if row.id == "slice_out-gpt2")
    results = {}
    for same in (False, True):
        fields = {"starts": "all", "same_on_all_ranks": same}
        ddp, single = (row.build(**fields).double().train() for _ in range(2))
        _gradient(row, accelerator.prepare(ddp), ddp, accelerator.process_index, accelerator.backward)
        for rank in range(accelerator.num_processes):  # adds up
            _gradient(row, single, single, rank, torch.Tensor.backward)
        pairs = list(zip(ddp.parameters(), single.parameters(), strict=True))
        far = max((p.grad - q.grad / accelerator.num_processes).abs().max().item() for p, q in pairs)  # pyright: ignore
        hidden: Any = ddp.transformer.h[0].mlp.c_fc.bias.grad
        results["same" if same else "own"] = {"difference": largest(far), "units": int((hidden != 0).sum())}
    return results


def _gradient(row: Row, model: Any, inner: Any, rank: int, backward: Any) -> None:
    context: Any = step_context(inner)
    context.rank = rank
    context.begin_step(0)
    share = BATCH // dist.get_world_size()
    backward(model(**batch(row, 0, slice(rank * share, (rank + 1) * share))).loss)


class Kill(TrainerCallback):
    """Ends a run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def switch_trainer(folder: Path, **options: Any) -> LowRankTrainer:
    """A run on GPT-2 that factorises itself on the way, with weight decay, factor decay and a schedule."""
    row = next(row for row in ROWS if row.id == "low_rank-gpt2")
    arguments = LowRankArguments(
        str(folder),
        max_steps=SWITCH_STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        factor_decay=0.1,
        logging_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"dense_warmup_steps": SWITCH_AT, **options},
    )
    data = row.architecture.batch(32)
    examples = [{name: values[i] for name, values in data.items()} for i in range(32)]
    config = LowRankConfig(rank=0.25)
    return LowRankTrainer(row.architecture.build(), arguments, train_dataset=examples, low_rank_config=config)


def losses(trainer: LowRankTrainer) -> list[float]:
    """The run's losses, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def from_start_losses(folder: Path) -> list[float]:
    """The losses of the run without its dense part."""
    run = switch_trainer(folder / "from_start", dense_warmup_steps=0)
    run.train()
    return losses(run)


def switch_results(folder: Path) -> dict[str, Any]:
    """One run without a break, and one that is killed after the switch and resumed."""
    run = switch_trainer(folder / "whole")
    run.train()
    killed = switch_trainer(folder / "killed")
    killed.add_callback(Kill(KILL_AT))
    try:
        killed.train()
    except KeyboardInterrupt:
        pass
    resumed = switch_trainer(folder / "killed")
    resumed.train(True)
    parameters = torch.cat([p.detach().flatten() for p in run.model.parameters()])  # pyright: ignore
    others = [torch.empty_like(parameters) for _ in range(dist.get_world_size())]
    dist.all_gather(others, parameters)
    return {
        "losses": losses(run),
        "resumed": losses(resumed),
        "factorised": sorted(name for name, _ in run.model.named_parameters() if "factor_v" in name),  # pyright: ignore
        "ranks_identical": all(torch.equal(other, others[0]) for other in others),
    }


def best_model_is_back(folder: Path) -> bool:
    """Whether a ViT, saved under an older layout's names, ends as its best checkpoint has it, the first of two."""
    architecture = next(row.architecture for row in ROWS if row.architecture.renamed_on_save)
    arguments = EfxArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = architecture.batch(16)
    examples = [{name: values[i] for name, values in data.items()} for i in range(16)]
    scores = [0.0, 1.0]
    trainer = EfxTrainer(
        architecture.build(),
        arguments,
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=lambda _: {"score": scores.pop()},
    )
    trainer.train()
    best = architecture.auto.from_pretrained(folder / "checkpoint-1").state_dict()
    return all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())  # pyright: ignore


def main(folder: Path) -> None:
    """Runs everything and writes the results."""
    gc.freeze()  # each `Trainer.train` collects garbage
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    share = BATCH // accelerator.num_processes
    part = slice(rank * share, (rank + 1) * share)
    results: dict[str, Any] = {
        "processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type),
        "apart": {row.id: apart_difference(row, part) for row in ROWS},
        "ddp": {row.id: ddp_difference(row, accelerator, part) for row in ROWS},
        "peft": {row.id: ddp_difference(row, accelerator, part, "peft") for row in ROWS if row.by_peft},
        "fsdp": {row.id: fsdp_difference(row, part) for row in ROWS},
        "fsdp_decay": fsdp_decay_difference(next(row for row in ROWS if row.method == "low_rank")),
        "own_slices": own_slices(accelerator),
        "from_start": from_start_losses(folder),
        "switch": switch_results(folder),
        "best_model_lost": largest(float(not best_model_is_back(folder / "best"))),
    }
    if accelerator.is_main_process:
        (folder / "results.json").write_text(json.dumps(results))
    accelerator.free_memory()
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
