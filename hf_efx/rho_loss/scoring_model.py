"""A small model that scores in the trained model's place, and learns beside it from the chosen examples."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from transformers import TrainingArguments

from hf_efx.core.training.step_context import derive_seed

_WEIGHTS, _OPTIMIZER = "scoring_model.safetensors", "scoring_optimizer.safetensors"


class ScoringModelTraining:
    """Trains a scoring model with AdamW, without touching the run's random state.

    Args:
        model: Computes its own loss from a batch with labels.
        args: The run's: betas, epsilon, weight decay, clipping and seed are taken from it.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        self.model, self.args = model, args
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        if args.world_size > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, 0)

    def step(self, batches: Sequence[Mapping[str, Any]], learning_rate: float, step: int) -> None:
        """One optimizer step on a step's micro-batches.

        Args:
            batches: What the trained model trains on in this step, of columns that the scoring model takes.
            learning_rate: The run's at this step.
            step: Optimizer step, from which dropout's random numbers derive.
        """
        devices = [p.device for p in self.model.parameters() if p.device.type != "cpu"][:1]
        kind = devices[0].type if devices else "cpu"
        self.model.train()
        with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad():
            torch.manual_seed(derive_seed(self.args.seed, step, 0, self.args.process_index, "scoring_model"))
            for batch in batches:
                outputs = self.model(**batch)
                loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
                (loss / len(batches)).backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.args.world_size > 1:
            for p in parameters:
                dist.all_reduce(p.grad)
                p.grad /= self.args.world_size  # pyright: ignore
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.args.world_size > 1:
            for buffer in self.model.buffers():  # batch statistics, of the first process as under DDP
                dist.broadcast(buffer, 0)

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state as safetensors."""
        save_model(self.model, str(folder / _WEIGHTS))
        state = self.optimizer.state_dict()
        tensors = {
            f"{i}.{name}": value.contiguous() for i, values in state["state"].items() for name, value in values.items()
        }
        save_file(tensors, folder / _OPTIMIZER, metadata={"param_groups": json.dumps(state["param_groups"])})

    def load(self, folder: Path) -> None:
        """Takes weights and optimizer state from a checkpoint.

        Raises:
            ValueError: If there are none.
        """
        if not (folder / _WEIGHTS).is_file():
            raise ValueError(
                f"{folder} holds no scoring model, but train_scoring_model=True: resume with the options that the run "
                f"was begun with, or start a new one."
            )
        load_model(self.model, str(folder / _WEIGHTS), device=str(next(self.model.parameters()).device))
        with safe_open(folder / _OPTIMIZER, framework="pt") as file:
            groups = json.loads(file.metadata()["param_groups"])
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key in file.keys():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
