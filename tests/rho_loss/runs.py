"""A small model, its data and its runs, for the tests of RHOLossTrainer."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from torch import nn

from hf_efx.core.data.tables import settings_of, with_settings
from hf_efx.rho_loss.arguments import RHOLossArguments
from hf_efx.rho_loss.irreducible import compute_irreducible_losses
from hf_efx.rho_loss.trainer import RHOLossMixin, RHOLossTrainer

ROWS, CLASSES = 160, 3


class Net(nn.Module):
    """A classifier with everything that scoring must leave alone: dropout and batch norm."""

    def __init__(self, seed: int = 0, dropout: float = 0.2, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = (nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
            self.layers = nn.Sequential(*layers, nn.Linear(width, CLASSES))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Plain(Net):
    """The same without batch norm and dropout: a row's loss doesn't depend on the others."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, 0.0)
        self.layers[1] = nn.Identity()


@functools.cache
def data(rows: int = ROWS) -> Dataset:
    """Rows of 4 numbers, the first of which is the id; the ids aren't positions."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((rows, 4)).astype(np.float32)
    labels = (x[:, 1:] + 0.5 * draw.standard_normal((rows, 3))).argmax(1)
    ids = 1000 + 7 * draw.permutation(rows)
    x[:, 0] = ids / 1000
    columns = {"x": x, "labels": labels, "example_id": ids, "wrong": draw.random(rows) < 0.25}
    kinds = {"labels": Value("int64"), "example_id": Value("int64"), "wrong": Value("bool")}
    return Dataset.from_dict(columns, features=Features({"x": List(Value("float32"), length=4), **kinds}))


def table(dataset: Dataset) -> Dataset:
    """Irreducible losses of another model."""
    return compute_irreducible_losses(Plain(seed=9), dataset, task="classification", fingerprint_columns=["x"])


standard_table = functools.cache(lambda: table(data()))


def with_losses(table: Dataset, losses: Sequence[float]) -> Dataset:
    """The table with other losses."""
    columns = {"example_id": table["example_id"][:], "irreducible_loss": np.asarray(losses, np.float32)}
    return with_settings(Dataset.from_dict(columns), settings_of(table))


class Recorder(RHOLossMixin):
    """Notes ids and scores of each step, and the rows that the model is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ids: dict[int, list[int]] = {}
        self.scores: dict[int, torch.Tensor] = {}
        self.seen: list[torch.Tensor] = []

    def on_selection(self, step: int, ids: torch.Tensor, scores: torch.Tensor) -> None:
        super().on_selection(step, ids, scores)
        assert step not in self.ids
        self.ids[step], self.scores[step] = ids.tolist(), scores

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and "x" in inputs:
            self.seen.append(inputs["x"][:, 0])
        return super().compute_loss(model, inputs, *args, **kwargs)


class RecordingTrainer(Recorder, RHOLossTrainer):
    """RHOLossTrainer that notes what it chooses."""


def arguments(folder: Path, cls: Any = RHOLossArguments, **options: Any) -> Any:
    """Options of a short run; 4 of 16 rows a step."""
    ours = {"selection_ratio": 0.25, "scoring_task": "classification"} if issubclass(cls, RHOLossArguments) else {}
    defaults = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1}
    fixed = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return cls(str(folder), **{**ours, **defaults, **fixed, **options})


def trainer(folder: Path, model: Any = None, cls: Any = RecordingTrainer, **options: Any) -> Any:
    """A run on `data`, with the table where `table` says so."""
    names = ("train_dataset", "eval_dataset", "irreducible_losses", "scoring_model")
    kwargs = {name: options.pop(name) for name in names if name in options}
    kwargs.setdefault("train_dataset", data())
    if options.get("selection", "rho_loss") == "rho_loss" and "irreducible_losses" not in kwargs:
        standard = kwargs["train_dataset"] is data()
        kwargs["irreducible_losses"] = standard_table() if standard else table(kwargs["train_dataset"])
    return cls(Net() if model is None else model, arguments(folder, **options), **kwargs)


def weights(run: Any) -> dict[str, torch.Tensor]:
    """The model's state, copied."""
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def logs(run: Any, name: str) -> list[float]:
    """A figure's values in the training logs."""
    return [entry[name] for entry in run.state.log_history if "loss" in entry and name in entry]
