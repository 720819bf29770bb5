"""Runs of a program on a `LearningTask`, side by side, by steps and by seconds: plot, results, card."""

import dataclasses
import gc
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import EvalResult
from transformers import Trainer

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.files import write_atomically
from hf_efx.core.results.card import write_model_card
from hf_efx.core.results.evidence import print_results, public_command, summary_table, write_results
from hf_efx.core.results.plots import matplotlib_pyplot
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.programs.tasks import LearningTask, TaskOptions
from hf_efx.registry import METHODS

PLOT, RESULTS, RUN = "curves.png", "results.json", "run.json"
COMPARED = "_compared"  # in the output folder; the Trainer pushes nothing that begins with an underscore
_TRAINING = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "per_device_train_batch_size", "seed")


@dataclass
class RunOptions:
    """What a program does beside training."""

    plot: bool = field(
        default=True, metadata={"help": f"Draw the curves by steps and by seconds into {PLOT}; needs matplotlib."}
    )


def program_defaults() -> dict[str, Any]:
    """Training arguments where a command line says nothing else, for `parser.set_defaults`.

    32 examples a step, AdamW at 1e-3 without a schedule and with torch's own weight decay, as in the configs of the
    RHO-LOSS paper (github.com/OATML/RHO-Loss).
    """
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 256,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 0.1,  # of the run
        "logging_steps": 20,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "ddp_find_unused_parameters": False,
    }


def set_up_logging(args: Any) -> None:
    """Shows this package's messages: of the first process all, of others warnings."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_efx").setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)


def push_and_end(trainer: Any) -> None:
    """Pushes what lies in the output folder, if asked for, and ends the process group; all processes must call it."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # the first process wrote meanwhile; groups end together
    trainer.end()


def end_processes() -> None:
    """Ends the process group of a program without a Trainer at its end, if there is one."""
    state = PartialState()
    state.wait_for_everyone()
    gc.collect()  # Trainers that are done: `EfxTrainerMixin.end` says why
    state.destroy_process_group()


def data_settings(options: TaskOptions, task: LearningTask) -> dict[str, Any]:
    """Settings of the data, for results and cards."""
    sizes = {"training examples": len(task.train), "holdout examples": len(task.holdout) if task.holdout else 0}
    noise = {"label_noise": options.label_noise} if options.label_noise else {}
    return {
        "task": task.task,
        **sizes,
        **noise,
        **({} if task.tokenizer is None else {"block_size": options.block_size}),
    }


@dataclass
class Run:
    """One finished run.

    Attributes:
        name: In tables and plots.
        figures: By name, for results.
        curve: Of each evaluation: step, training seconds, metric.
    """

    name: str
    figures: dict[str, Any]
    curve: list[tuple[int, float, float]]

    def save(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Writes it as run.json: a resumed program knows by it that the run is finished."""
        write_atomically(folder / RUN, json.dumps({**dataclasses.asdict(self), "settings": settings}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "Run | None":
        """The finished run of a folder, None if there is none or it had other settings."""
        file = folder / RUN
        if not file.is_file():
            return None
        content = json.loads(file.read_text())
        return cls(**content) if content.pop("settings") == json.loads(json.dumps(settings)) else None


def run_settings(args: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """What of the arguments a finished run must share to be taken for this one.

    Args:
        args: Training arguments.
        names: A method's own ones among them.
    """
    common = ("max_steps", "num_train_epochs", "learning_rate", "seed", "per_device_train_batch_size")
    return {name: getattr(args, name) for name in (*names, *common)}


def compared_arguments(args: Any, name: str, **changed: Any) -> Any:
    """The arguments of a run beside the program's own, which is kept in a folder below and pushed nowhere."""
    folder = str(Path(str(args.output_dir), COMPARED, name))
    alone: dict[str, Any] = {"push_to_hub": False, "report_to": [], "resume_from_checkpoint": None}
    return dataclasses.replace(args, output_dir=folder, **alone, **changed)


def train_run(
    name: str,
    trainer: Any,
    task: LearningTask,
    settings: Mapping[str, Any],
    resume: Any = None,
    save: bool = False,
    figures: Callable[[Any], Mapping[str, Any]] | None = None,
) -> Run:
    """Trains and gathers the figures; all processes must call it.

    Args:
        name: Of the run.
        trainer: With a `TrainingClock` among its callbacks.
        task: The task.
        settings: By which a resumed program knows the finished run.
        resume: As in `Trainer.train`.
        save: Whether to save the model and what makes its inputs.
        figures: Gives a method's own figures of the trainer after training, on all processes.

    Raises:
        RuntimeError: If it fails after its first step.
    """
    folder = Path(str(trainer.args.output_dir))
    if not resume and trainer.is_world_process_zero():
        (folder / RUN).unlink(missing_ok=True)  # of another run
    try:
        output = trainer.train(resume)
    except (ValueError, OSError, ImportError) as error:
        if trainer.state.global_step:  # not the input's fault: a traceback, no short line
            raise RuntimeError(f"{name} failed at step {trainer.state.global_step}") from error
        raise
    run = finish_run(name, trainer, task, output.metrics)
    if figures is not None:
        run.figures |= figures(trainer)
    if save:
        trainer.save_model(_internal_call=True)  # otherwise it would push before the card is there
    if trainer.is_world_process_zero():
        if save:
            task.save_processor(folder)
        run.save(folder, settings)
    return run


def finish_run(name: str, trainer: Trainer, task: LearningTask, output: Mapping[str, float]) -> Run:
    """Evaluates a trained model, if its last step wasn't, and gathers its figures; all processes must call it.

    Args:
        name: Of the run.
        trainer: After training, with a `TrainingClock` among its callbacks.
        task: The task.
        output: The metrics of `train()`.
    """
    state = trainer.state
    evaluations = [row for row in state.log_history if f"eval_{task.metric}" in row]
    # A best model that was loaded at the end isn't what the last evaluation saw.
    if not evaluations or evaluations[-1]["step"] != state.global_step or trainer.args.load_best_model_at_end:
        trainer.evaluate()
        evaluations = [row for row in state.log_history if f"eval_{task.metric}" in row]
    clock = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TrainingClock))
    curve = [(int(row["step"]), row["train_seconds"], row[f"eval_{task.metric}"]) for row in evaluations]
    best = (max if task.higher_is_better else min)(curve, key=lambda point: point[2])
    model: Any = trainer.model
    figures = {
        **{key: value for key, value in output.items() if key.startswith("train_")},
        **{key: value for key, value in evaluations[-1].items() if key.startswith("eval_")},
        f"best_{task.metric}": best[2],
        "best_step": best[0],
        "steps": state.global_step,
        "train_seconds": clock.seconds,
        "parameters": model.num_parameters(),
    }
    return Run(name, figures, curve)


def compare_runs(runs: Sequence[Run], baseline: str, task: LearningTask) -> None:
    """Adds to each run when it first reached the baseline's best: `steps_to_baseline`, `seconds_to_baseline`.

    A run that never did gets neither.
    """
    target = next(run for run in runs if run.name == baseline).figures[f"best_{task.metric}"]
    for run in runs:
        reached = (p for p in run.curve if (p[2] >= target if task.higher_is_better else p[2] <= target))
        if point := next(reached, None):
            run.figures["steps_to_baseline"], run.figures["seconds_to_baseline"] = point[:2]


def plot_runs(runs: Sequence[Run], metric: str, path: Path) -> None:
    """Draws the metric by steps and by training seconds into a PNG.

    Raises:
        ImportError: If matplotlib isn't installed.
    """
    plt = matplotlib_pyplot()
    figure, (steps, seconds) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for run in runs:
        at, took, values = zip(*run.curve, strict=True)
        steps.plot(at, values, marker="o", markersize=3, label=run.name)
        seconds.plot(took, values, marker="o", markersize=3, label=run.name)
    steps.set(xlabel="optimizer step", ylabel=f"validation {metric}")
    seconds.set(xlabel="training seconds (loading and scoring in, evaluation out)")
    for axes in (steps, seconds):
        axes.grid(alpha=0.3)
    steps.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_runs(
    folder: Path,
    method: str,
    runs: Sequence[Run],
    trainer: Any,
    task: LearningTask,
    *,
    command: Sequence[str],
    plot: bool,
    card: bool,
    configuration: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    baseline: str | None = None,
    note: str = "",
    columns: Sequence[Mapping[str, str]] = (),
) -> None:
    """Writes plot, results and card beside a checkpoint, and prints the comparison.

    Args:
        folder: Of the checkpoint.
        method: Its name in the registry.
        runs: The checkpoint's own first.
        trainer: Of the checkpoint.
        task: The task.
        command: The command's words, for the results.
        plot: Whether to draw.
        card: Whether to write a card.
        configuration: The method's settings.
        settings: Further settings of the training.
        baseline: The run whose best the others are compared with, if there is one.
        note: Further sentences of the card.
        columns: Further columns of the comparison, as in `evidence.write_results`.
    """
    args = trainer.args
    if baseline:
        compare_runs(runs, baseline, task)
    if plot:
        plot_runs(runs, task.metric, folder / PLOT)
    training = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in _TRAINING}
    training |= {"steps": runs[0].figures["steps"], "processes": args.world_size, **(settings or {})}
    shown: list[Mapping[str, str]] = [
        {"key": f"best_{task.metric}", "title": f"best {task.metric}", "format": ".4g"},
        {"key": f"eval_{task.metric}", "title": "at the end", "format": ".4g"},
        {"key": "steps", "title": "steps", "format": "d"},
        {"key": "train_seconds", "title": "seconds", "format": ".1f"},
    ]
    if baseline:
        shown += [
            {"key": "steps_to_baseline", "title": f"steps to best of {baseline}", "format": "d"},
            {"key": "seconds_to_baseline", "title": f"seconds to best of {baseline}", "format": ".1f"},
        ]
    if any("corrupted_share" in run.figures for run in runs):
        shown.append({"key": "corrupted_share", "title": "corrupted among the chosen", "format": ".1%"})
    results = write_results(
        folder / RESULTS,
        title=f"{METHODS[method].title} on {task.name}",
        command=public_command(command),
        data={"name": task.name, "fingerprint": data_fingerprint(task.train, task.fingerprint_columns)},
        seeds=[args.seed],
        rows=[{"configuration": run.name, "seed": args.seed, **run.figures} for run in runs],
        claims=[],
        columns=[*shown, *columns],
        settings={**training, **configuration},
        plot=PLOT if plot else None,
    )
    if card:
        write_task_card(
            folder, method, runs, trainer, task, training, configuration, summary_table(results), note, plot
        )
    print_results(results)


def write_task_card(
    folder: Path,
    method: str,
    runs: Sequence[Run],
    trainer: Any,
    task: LearningTask,
    training: Mapping[str, Any],
    configuration: Mapping[str, Any],
    comparison: Any,
    note: str,
    plot: bool,
) -> None:
    """Writes the card of the first run's model, with its figures in `model-index`."""
    row, names = METHODS[method], ("accuracy",) if task.labels else ("perplexity", "bits_per_byte")
    parts: dict[str, Any] = {
        "model_name": folder.resolve().name,
        "repo_id": None if folder.is_absolute() else folder.as_posix(),
    }
    if trainer.args.push_to_hub:
        parts = {"repo_id": trainer.hub_model_id, "model_name": str(trainer.hub_model_id).rpartition("/")[2]}
    model = trainer.accelerator.unwrap_model(trainer.model)
    write_model_card(
        folder,
        methods=[method],
        results=[
            EvalResult(
                task_type=task.pipeline_tag,
                dataset_type=re.sub(r"[^\w.-]+", "-", task.name),
                dataset_name=task.name,
                dataset_split="validation",
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=runs[0].figures[f"eval_{name}"],
            )
            for name in names
        ],
        description=(
            f"A {model.config.model_type} model of {runs[0].figures['parameters']:,} parameters, trained by "
            f"{row.title}. {note}".rstrip()
        ),
        auto_class=task.auto_class,
        needs_hf_efx=False,
        configuration={method: configuration},
        training=training,
        comparison=comparison if len(runs) > 1 else None,
        plot=PLOT if plot else None,
        citations=[row.citation],
        pipeline_tag=task.pipeline_tag,
        **parts,
    )
