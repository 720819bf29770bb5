"""A tiny GPT-2, its data and its LowRankTrainer, for the tests of the trainer and of its switch."""

from pathlib import Path
from typing import Any

import torch
from matrix import ARCHITECTURES
from transformers import Trainer

from hf_efx import LowRankArguments, LowRankConfig, LowRankTrainer

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")
STEPS, SWITCH = 6, 3
TOKENS = GPT2.batch(16)["input_ids"]
DATA: Any = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]  # 4 steps an epoch


def build(dropout: float = 0.1) -> Any:
    """Dropout draws random numbers, so that a resume which loses their state shows. The global seed stays."""
    config = GPT2.config()
    config.update({"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2.auto.from_config(config)


def arguments(folder: Path, cls: Any = LowRankArguments, **options: Any) -> Any:
    defaults = {"max_steps": STEPS, "save_strategy": "no", "learning_rate": 1e-2, "weight_decay": 0.1}
    fixed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": [], "disable_tqdm": True}
    return cls(str(folder), use_cpu=True, **{**defaults, **fixed, "logging_steps": 1, **options})


def trainer(folder: Path, config: Any = ..., model: Any = None, **options: Any) -> LowRankTrainer:
    return LowRankTrainer(
        build() if model is None else model,
        arguments(folder, **{"dense_warmup_steps": SWITCH, **options}),
        train_dataset=DATA,
        low_rank_config=LowRankConfig() if config is ... else config,
    )


def run(folder: Path, config: Any = ..., model: Any = None, **options: Any) -> LowRankTrainer:
    result = trainer(folder, config, model, **options)
    result.train()
    return result


def state(run: Trainer) -> dict[str, torch.Tensor]:
    return run.model.state_dict()  # pyright: ignore


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
