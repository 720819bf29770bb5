"""What the studies of RHO-LOSS and GoldiProx share: tables, a clock that leaves evaluation out, figures.

Each run trains in a process of its own on one thread (`study_jobs`). Its seconds are CPU seconds of that process from
the Trainer's making on: loading, scoring, choosing and steps, without evaluation; other processes on the machine don't
change them.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from noisy_images import Images, accuracy
from torch import nn

BATCH, RATIO, LEARNING_RATE = 32, 0.1, 1e-3  # github.com/OATML/RHO-Loss, configs
# What trains the irreducible-loss models: large batches and a rate that falls to 0 give better ones for less than the
# target's own recipe. A CNN learns what no MLP does, so that an MLP's losses hold it back.
_FALLING = {"lr_scheduler_type": "linear"}
IRREDUCIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp-128", {"per_device_train_batch_size": 512, "learning_rate": 6e-3, **_FALLING}),
    "cnn": ("cnn", {"per_device_train_batch_size": 256, "learning_rate": 4e-3, "bf16": True, **_FALLING}),
}
IRREDUCIBLE_EPOCHS = 5
CROSS_FIT = {"per_device_train_batch_size": 256, "learning_rate": 4e-3, **_FALLING}


def clock_and_curve(
    evaluate: Callable[[nn.Module], float],
    every: int,
    queue: Any = None,
    clock: Callable[[], float] = time.process_time,
    stop_at: float = math.inf,
) -> Any:
    """A callback that evaluates every so many steps, and counts seconds without that.

    Its `curve` holds (step, seconds, figure); the clock starts when it is made.

    Args:
        evaluate: Gives the figure.
        every: Steps.
        queue: Takes 1 a step.
        clock: CPU seconds of this process, or others.
        stop_at: A figure that ends the run.
    """
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        def __init__(self) -> None:
            self.curve: list[tuple[int, float, float]] = []
            self.start = clock()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if queue is not None:
                queue.put(1)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                now = clock()
                self.curve.append((state.global_step, now - self.start, evaluate(model)))
                control.should_training_stop |= self.curve[-1][2] >= stop_at
                self.start += clock() - now

    return Curve()


def arguments(folder: str, seed: int, steps: int, **options: Any) -> Any:
    """RHOLossArguments as the studies have them."""
    from hf_efx.rho_loss.arguments import RHOLossArguments

    common = {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "selection_ratio": RATIO,
        "weight_decay": 0.01,  # torch's default for AdamW, the paper's optimiser
        "max_grad_norm": 0.0,
        "logging_steps": max(steps // 24, 1),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
        "data_seed": seed,
        "model_card": False,
    }
    return RHOLossArguments(**{**common, **options})


def quiet(trainer: Any) -> Any:
    """Takes the Trainer's own printing off: the study has a bar."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def training_flops(model: nn.Module, batch: Mapping[str, torch.Tensor], scored: int, scorer: nn.Module | None) -> int:
    """FLOPs of a step: forward and backward on the batch, and a forward on `scored` rows (a step's share of them)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    model.zero_grad()
    with FlopCounterMode(display=False) as scoring, torch.no_grad():
        (scorer or model)(**batch)
    rows = len(batch["labels"])
    return counter.get_total_flops() + round(scoring.get_total_flops() * scored / rows)


def reached(curve: Sequence[Sequence[float]], bar: float, higher: bool = True) -> tuple[float | None, float | None]:
    """Steps and seconds of the first evaluation that is as good as the bar, None if there is none."""
    for step, seconds, figure in curve:
        if (figure >= bar) if higher else (figure <= bar):
            return step, seconds
    return None, None


def against_uniform(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row what it needed for its seed's uniform best: steps, seconds, FLOPs, as shares of uniform's."""
    uniform = {(r["part"], r["seed"]): r for r in rows if r["configuration"].endswith(": uniform")}
    results = []
    for row in rows:
        base = uniform.get((row["part"], row["seed"]))
        if base is None or "curve" not in row:
            results.append(row)
            continue
        higher = row["part"] != "lm"
        steps, seconds = reached(row["curve"], base["best"], higher)
        own_steps, own_seconds = reached(base["curve"], base["best"], higher)
        assert own_steps is not None and own_seconds is not None
        more: dict[str, Any] = {"steps_to": steps, "seconds_to": seconds, "gain": row["best"] - base["best"]}
        if steps is not None and seconds is not None:
            paid = seconds + row["table_seconds"]
            flops = steps * row["flops_per_step"] / (own_steps * base["flops_per_step"])
            more |= {"steps_share": steps / own_steps, "time_share": seconds / own_seconds}
            more |= {"paid_share": paid / own_seconds, "flops_share": flops}
        results.append({**row, **more})
    return results


def thinned(row: dict[str, Any], points: int = 24) -> dict[str, Any]:
    """A row with shorter curves."""
    result = dict(row)
    for key, values in row.items():
        if key.endswith("curve") and len(values) > points:
            keep = {round(i * (len(values) - 1) / (points - 1)) for i in range(points)}
            result[key] = [[round(float(v), 5) for v in values[i]] for i in sorted(keep)]
    return result


def train(trainer: Any, watch: Any, folder: str) -> dict[str, Any]:
    """Trains, and returns what was seen: the curve, and the selection report's shares over time."""
    quiet(trainer).train()
    log = trainer.state.log_history
    report = json.loads((Path(folder) / "selection_report.json").read_text())
    shares = {
        name: [[row["step"], row[f"rho_loss/{name}"]] for row in log if f"rho_loss/{name}" in row and "loss" in row]
        for name in ("corrupted_share", "right_share")
    }
    row: dict[str, Any] = {"seconds": watch.curve[-1][1], "curve": watch.curve}
    row |= {f"{name}_curve": values for name, values in shares.items() if values}
    names = ("corrupted_share", "drawn_corrupted_share", "right_share", "drawn_right_share", "repeated_1_share")
    return row | {name: report[name] for name in (*names, "scoring_time_share") if name in report}


def irreducible_table(images: Images, seed: int, folder: Path, kind: str = "mlp") -> tuple[Any, dict[str, Any]]:
    """Trains a small model on the holdout and makes the table, or reads it; figures and cost lie beside it."""
    from hf_efx.rho_loss.irreducible import compute_irreducible_losses
    from hf_efx.rho_loss.irreducible_table import load_irreducible_losses
    from hf_efx.rho_loss.trainer import RHOLossTrainer

    figures = folder.with_suffix(".json")
    if figures.exists():
        return load_irreducible_losses(folder), json.loads(figures.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        name, recipe = IRREDUCIBLE[kind]
        options = {**recipe, "selection_ratio": 1.0, "report_selection": False, "scoring_task": "classification"}
        size = min(int(options["per_device_train_batch_size"]), len(images.holdout) // 4)
        options["per_device_train_batch_size"] = size
        steps = IRREDUCIBLE_EPOCHS * -(-len(images.holdout) // size)
        args = arguments(temporary, 100 + seed, steps, **options)
        model = images.model(name, 100 + seed)
        quiet(RHOLossTrainer(model, args, train_dataset=images.holdout)).train()
    # A falling rate and few epochs: the last weights have the lowest loss on the training set.
    table = compute_irreducible_losses(
        model, images.train, task="classification", batch_size=500, fingerprint_columns=["labels"], output_dir=folder
    )
    seconds = time.process_time() - start
    row = {"seconds": seconds, "accuracy": accuracy(model, *images.test), "loss": float(np.mean(_losses(table)))}
    figures.write_text(json.dumps(row))
    return table, row


def cross_fit_table(images: Images, seed: int, folder: Path, name: str = "mlp-128") -> tuple[Any, dict[str, Any]]:
    """The same without a holdout: two models, each trained on one half of the training set, score the other half."""
    from transformers import TrainingArguments

    from hf_efx.rho_loss.cross_fit import cross_fit_irreducible_losses
    from hf_efx.rho_loss.irreducible_table import load_irreducible_losses

    figures = folder.with_suffix(".json")
    if figures.exists():
        return load_irreducible_losses(folder), json.loads(figures.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        size = min(int(CROSS_FIT["per_device_train_batch_size"]), len(images.train) // 8)
        args = TrainingArguments(
            temporary,
            **{**CROSS_FIT, "per_device_train_batch_size": size},  # pyright: ignore
            num_train_epochs=2 * IRREDUCIBLE_EPOCHS,
            per_device_eval_batch_size=500,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=100 + seed,
        )
        table = cross_fit_irreducible_losses(
            lambda: images.model(name, 100 + seed),
            images.train,
            args=args,
            label_column="labels",
            task="classification",
            fingerprint_columns=["labels"],
            output_dir=folder,
        )
    row = {"seconds": time.process_time() - start, "loss": float(np.mean(_losses(table)))}
    figures.write_text(json.dumps(row))
    return table, row


def permuted(table: Any, seed: int) -> Any:
    """The table with its losses dealt out to other examples."""
    from datasets import Dataset

    from hf_efx.core.data.tables import settings_of, with_settings
    from hf_efx.rho_loss.irreducible_table import KIND

    losses = np.random.default_rng(seed).permutation(_losses(table)).astype(np.float32)
    columns = {"example_id": table.with_format("numpy")["example_id"][:], "irreducible_loss": losses}
    return with_settings(Dataset.from_dict(columns, features=table.features), settings_of(table, KIND))


def _losses(table: Any) -> np.ndarray:
    return np.asarray(table.with_format("numpy")["irreducible_loss"][:])
