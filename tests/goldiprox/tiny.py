"""A tiny classification task and sequences over it, for the tests of this folder and their second process."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matrix import ARCHITECTURES
from transformers import Trainer

from hf_efx import EfxArguments
from hf_efx.core.data.tables import data_fingerprint, with_settings
from hf_efx.goldiprox.recording import steps_table
from hf_efx.goldiprox.replay import ReplayTrainer
from hf_efx.goldiprox.sequence import SelectionSequence
from hf_efx.goldiprox.trainer import GoldiProxTrainer
from hf_efx.rho_loss.arguments import RHOLossArguments

BERT = next(architecture for architecture in ARCHITECTURES if architecture.name == "bert")
ROWS = 48
COLUMNS = ["input_ids", "labels"]
STEPS = 6


@functools.cache
def data(seed: int | None = 1) -> Dataset:
    """Rows whose ids have gaps and whose first two tokens tell the id; in no order, or with None in the ids' own."""
    batch = BERT.batch(ROWS)
    batch["input_ids"][:, 0], batch["input_ids"][:, 1] = torch.arange(ROWS) // 8 + 10, torch.arange(ROWS) % 8 + 10
    order = np.arange(ROWS) if seed is None else np.random.default_rng(seed).permutation(ROWS)
    columns = {name: values.numpy()[order] for name, values in batch.items()}
    return Dataset.from_dict({"example_id": 3 * order + 5, **columns})


def ids_of(inputs: dict[str, torch.Tensor]) -> list[int]:
    """The ids that a batch's tokens tell."""
    tokens = inputs["input_ids"]
    return (3 * (8 * (tokens[:, 0] - 10) + tokens[:, 1] - 10) + 5).tolist()


@functools.cache
def irreducible_losses() -> Dataset:
    """A made-up table for the data set."""
    losses = np.random.default_rng(2).random(ROWS).astype(np.float32)
    settings = {
        "kind": "irreducible_losses",
        "data_fingerprint": data_fingerprint(data(), COLUMNS),
        "fingerprint_columns": COLUMNS,
        "rows": ROWS,
        "model_name": "made-up",
        "tokenizer": None,
        "task": "classification",
        "granularity": "example",
        "label_smoothing": 0.0,
    }
    table = Dataset.from_dict({"example_id": 3 * np.arange(ROWS) + 5, "irreducible_loss": losses})
    return with_settings(table, settings)


def proxy(folder: Path, net: Any = None, rows: Any = None, table: Any = None, **options: Any) -> GoldiProxTrainer:
    """A proxy that chooses 4 of 16 drawn, or per process and micro-batch as many as the options say."""
    defaults = {"per_device_train_batch_size": 4, "selection_ratio": 0.25, "report_selection": False}
    return GoldiProxTrainer(
        model() if net is None else net,
        arguments(folder, RHOLossArguments, **{**defaults, **options}),
        train_dataset=data() if rows is None else rows,
        irreducible_losses=irreducible_losses() if table is None else table,
    )


def draw(steps: int = STEPS, size: int = 8, last: int | None = None, seed: int = 0) -> list[list[int]]:
    """Ids at random for each step, within a step without replacement; as many in the last one as `last` says."""
    generator = np.random.default_rng(seed)
    sizes = [size] * (steps - 1) + [size if last is None else last]
    return [(3 * generator.permutation(ROWS)[:n] + 5).tolist() for n in sizes]


def sequence(ids: list[list[int]]) -> SelectionSequence:
    arrays = [np.array(each) for each in ids]
    table = Dataset(steps_table(0, arrays, [each / 10 for each in arrays]))
    known = {"fingerprint": data_fingerprint(data(), COLUMNS), "columns": COLUMNS, "rows": 48}
    return SelectionSequence.make(table, known)


def model(dropout: float = 0.0, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = BERT.config()
    config.update({"hidden_dropout_prob": dropout})
    return BERT.auto.from_config(config)


def arguments(folder: Path, cls: Any = EfxArguments, **options: Any) -> Any:
    defaults = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.1, "save_strategy": "no"}
    fixed = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
    return cls(str(folder), **{**defaults, **fixed, **options})


class Watched(ReplayTrainer):
    """Keeps the ids of each micro-batch that is trained on."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        if model.training:
            self.seen = [*getattr(self, "seen", []), ids_of(inputs)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def replay(folder: Path, steps: SelectionSequence, net: Any = None, rows: Any = None, **options: Any) -> Watched:
    net = model() if net is None else net
    rows = data() if rows is None else rows
    return Watched(net, arguments(folder, **options), train_dataset=rows, sequence=steps)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


def assert_equal_weights(one: Trainer, other: Trainer) -> None:
    """Bit for bit, and that something was trained at all."""
    assert one.state.global_step and any(entry.get("grad_norm", 0) > 0 for entry in one.state.log_history)
    assert weights(one).keys() == weights(other).keys()
    assert [name for name, value in weights(one).items() if not torch.equal(value, weights(other)[name])] == []
