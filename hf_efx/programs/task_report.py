"""What a program leaves of its runs beside the checkpoint: plot, results, card; and the push of it all."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.model.record import config_class, efx_record
from hf_efx.core.results.card import eval_results, write_model_card
from hf_efx.core.results.evidence import print_results, summary_table, write_results
from hf_efx.core.results.plots import matplotlib_pyplot, save_figure
from hf_efx.programs.command_line import config_option_fields
from hf_efx.programs.frame import not_the_input
from hf_efx.programs.task_run import Run, TaskJob
from hf_efx.programs.tasks import LearningTask
from hf_efx.registry import METHODS

PLOT, RESULTS = "curves.png", "results.json"
_TRAINING = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "per_device_train_batch_size", "seed")

Columns = Sequence[Mapping[str, str]]


@dataclass
class Report:
    """What a method's program has to say of its runs.

    Attributes:
        title: Of the results; without it the method and the data.
        configuration: The method's settings.
        note: Further sentences of the card.
        baseline: The run whose best the others are compared with, if there is one.
        columns: Further columns of the comparison, as in `evidence.write_results`.
        settings: Further settings of the training.
        plot: The plot's file name.
        draw: Draws it, from the runs, the metric and the path.
    """

    title: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    baseline: str | None = None
    columns: Columns = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    plot: str = PLOT
    draw: "Callable[[Sequence[Run], str, Path], None] | None" = None


def own_fields(config: Any) -> dict[str, Any]:
    """The fields of a method's config that are the method's own, by name."""
    return {f.name: getattr(config, f.name) for f in config_option_fields(type(config))}


def report_runs(job: TaskJob, trainer: Any, runs: Sequence[Run], report: Report) -> None:
    """Writes plot, results and card beside the checkpoint, prints the comparison, and pushes, if asked to.

    Args:
        job: The program's.
        trainer: Of the checkpoint; all processes must call this.
        runs: The checkpoint's own first.
        report: What the method has to say of them.
    """
    with not_the_input("writing the results"):
        if trainer.is_world_process_zero():
            _write(job, trainer, runs, report)
        if job.args.push_to_hub:
            trainer.push_to_hub()
        trainer.accelerator.wait_for_everyone()  # the first process wrote meanwhile; groups end together


def _write(job: TaskJob, trainer: Any, runs: Sequence[Run], report: Report) -> None:
    args, task = job.args, job.task
    if report.baseline:
        compare_runs(runs, report.baseline, task)
    if job.plot:
        (report.draw or plot_runs)(runs, task.metric, job.folder / report.plot)
    training = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in _TRAINING}
    training |= {"steps": runs[0].figures["steps"], "processes": args.world_size, **job.settings, **report.settings}
    results = write_results(
        job.folder / RESULTS,
        title=report.title or f"{METHODS[job.method].title} on {task.name}",
        command=job.command,
        data={"name": task.name, "fingerprint": data_fingerprint(task.train, task.fingerprint_columns)},
        seeds=[args.seed],
        rows=[{"configuration": run.name, "seed": args.seed, **run.figures} for run in runs],
        claims=[],
        columns=[*_columns(task.metric, runs, report.baseline), *report.columns],
        settings={**training, **report.configuration},
        plot=report.plot if job.plot else None,
    )
    if job.card:
        write_task_card(
            job.folder,
            trainer,
            task,
            runs[0].figures,
            method=job.method,
            configuration=report.configuration,
            note=report.note,
            training=training,
            comparison=summary_table(results) if len(runs) > 1 else None,
            plot=report.plot if job.plot else None,
        )
    print_results(results)
    print(f"checkpoint: {job.folder}")


def _columns(metric: str, runs: Sequence[Run], baseline: str | None) -> list[Mapping[str, str]]:
    shown = [
        (f"best_{metric}", f"best {metric}", ".4g"),
        (f"eval_{metric}", "at the end", ".4g"),
        ("steps", "steps", "d"),
        ("train_seconds", "seconds", ".1f"),
    ]
    if baseline:
        shown += [("steps_to_baseline", f"steps to best of {baseline}", "d")]
        shown += [("seconds_to_baseline", f"seconds to best of {baseline}", ".1f")]
    if any("corrupted_share" in run.figures for run in runs):
        shown += [("corrupted_share", "corrupted among the chosen", ".1%")]
    return [{"key": key, "title": title, "format": spec} for key, title, spec in shown]


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
    save_figure(figure, path)


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draws training losses as lines and validation losses as dots, both in nats per token, into a PNG.

    Args:
        histories: The Trainer's log of each run, by its name in the legend.
        path: The file.

    Raises:
        ImportError: If matplotlib isn't installed.
    """
    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, (name, history) in enumerate(histories.items()):
        train = [(row["step"], row["loss"]) for row in history if "loss" in row]
        held_out = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
        line = axes.plot(*zip(*train, strict=True), alpha=0.5, linewidth=1)[0] if train else None
        colour = line.get_color() if line else None
        style = ("-", "--", ":", "-.")[i % 4]  # runs that lie on each other are both seen
        axes.plot(*zip(*held_out, strict=True), style, marker="o", color=colour, markersize=4, label=name)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.set_title("thin: training, dots: validation", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def evaluations(task: LearningTask, figures: Mapping[str, float]) -> list[EvalResult]:
    """Figures of a task's validation data, by their names, as cards take them."""
    return eval_results(figures, **evaluated_on(task))


def evaluated_on(task: LearningTask) -> dict[str, Any]:
    """The task and its data, in the words of `huggingface_hub.EvalResult`."""
    return {
        "task_type": task.pipeline_tag,
        "dataset_type": re.sub(r"[^\w.-]+", "-", task.name),
        "dataset_name": task.name,
        "dataset_split": "validation",
    }


def card_names(folder: Path, trainer: Any) -> dict[str, Any]:
    """What a card calls a model, and where it is loaded from: the folder, or what is pushed."""
    if trainer.args.push_to_hub:
        return {"repo_id": trainer.hub_model_id, "model_name": str(trainer.hub_model_id).rpartition("/")[2]}
    return {"model_name": folder.resolve().name, "repo_id": None if folder.is_absolute() else folder.as_posix()}


def write_task_card(
    folder: Path,
    trainer: Any,
    task: LearningTask,
    figures: Mapping[str, Any],
    *,
    method: str,
    configuration: Mapping[str, Any],
    note: str = "",
    **parts: Any,
) -> Path:
    """Writes the card of a trained model, with its figures in `model-index`.

    Args:
        folder: Of the checkpoint.
        trainer: Its Trainer.
        task: What it was trained and evaluated on.
        figures: Of its run.
        method: By which it was trained, as in the registry; `configuration` is empty where it wasn't.
        configuration: The method's settings.
        note: Further sentences of the description.
        **parts: Further parts of the card, as `write_model_card` takes them.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    recorded: list[str] = [entry["method"] for entry in (efx_record(model) or {"methods": []})["methods"]]
    methods = recorded + ([method] if configuration and method not in recorded else [])
    dense = figures.get("dense_parameters", figures["parameters"])
    size = "" if dense == figures["parameters"] else f" ({dense:,} with dense layers)"
    kind = f"trained by {', '.join(METHODS[name].title for name in methods)}" if methods else "by dense training"
    return write_model_card(
        folder,
        methods=methods,
        results=evaluations(task, {name: figures[f"eval_{name}"] for name in task.metrics}),
        description=(
            f"A {model.config.model_type} model of {figures['parameters']:,} parameters{size}, {kind}. {note}".rstrip()
        ),
        auto_class=task.auto_class,
        needs_hf_efx=any(config_class(name).changes_skeleton for name in recorded),
        configuration={method: configuration} if configuration else {},
        citations=[METHODS[name].citation for name in methods],
        pipeline_tag=task.pipeline_tag,
        **card_names(folder, trainer),
        **parts,
    )
