"""The program behind `scripts/prune.py`: how a checkpoint stands pruning, and the pruned or smaller checkpoint.

    python scripts/prune.py --model runs/targeted_dropout                       # the curve alone
    python scripts/prune.py --model runs/targeted_dropout --fraction 0.9        # and a checkpoint of zeros
    python scripts/prune.py --model gpt2 --task causal_lm --dataset my_text.jsonl --granularity unit \\
        --target_modules c_fc --fraction 0.5 --shrink                           # and a smaller one

"Learning Sparse Networks Using Targeted Dropout", Gomez et al. 2019, arXiv 1905.13678.
"""

import copy
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import EvalResult
from torch import nn

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.files import write_atomically
from hf_efx.core.model.record import config_class, efx_record
from hf_efx.core.results.card import write_model_card
from hf_efx.core.results.curves import PruningCurve, check_fractions
from hf_efx.core.results.evidence import print_results, public_command, summary_table, write_results
from hf_efx.core.results.plots import matplotlib_pyplot
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.programs.command_line import OptionParser
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_run import (
    RESULTS,
    data_settings,
    end_processes,
    program_defaults,
    push_and_end,
    set_up_logging,
)
from hf_efx.programs.tasks import CheckpointTaskOptions, LearningTask, TaskModelOptions
from hf_efx.registry import METHODS
from hf_efx.targeted_dropout.curve import FRACTIONS, pruning_curve
from hf_efx.targeted_dropout.pruning import PruningPlan, PruningReport, prune
from hf_efx.targeted_dropout.shrink import shrink

PLOT, CURVE = "pruning_curve.png", "pruning_curve.json"


@dataclass
class PruneOptions:
    """What is pruned, and what becomes of it."""

    fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share to prune for good, from 0 to below 1: more is smaller, and costs more of the metric, as "
            "the curve shows. Without it nothing is pruned and no checkpoint written."
        },
    )
    granularity: Literal["weight", "unit"] = field(
        default="weight",
        metadata={
            "help": "'weight' costs the metric least, but only makes zeros, which take as many bytes and as much "
            "time; 'unit' prunes FFN features, heads and channels, which --shrink can take out."
        },
    )
    scope: Literal["column", "layer", "global"] = field(
        default="column",
        metadata={
            "help": "Among which the weakest are found: each output unit's weights, as targeted dropout trains by "
            "default, each layer's, or all. 'global' puts the cut where it costs least, may empty a layer, which is "
            "refused, and leaves unequal counts of units, which can't be shrunk."
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to prune, by suffix. Without it those that targeted dropout was trained on, else every "
            "Linear, Conv1D and Conv2d that is no embedding, stem or head."
        },
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Modules to leave alone."})
    fractions: list[float] = field(
        default_factory=lambda: list(FRACTIONS),
        metadata={"help": "Shares at which the curve is drawn; each costs an evaluation."},
    )
    shrink: bool = field(
        default=False,
        metadata={"help": "Take pruned units out: fewer bytes and less time. It needs granularity 'unit'."},
    )
    timed_rounds: int = field(
        default=5, metadata={"help": "Steps that are timed of each model, in turn; more are surer, and take longer."}
    )
    plot: bool = field(default=True, metadata={"help": f"Draw the curve into {PLOT}; needs matplotlib."})

    def __post_init__(self) -> None:
        if self.fraction is not None:
            check_fractions([self.fraction], "fraction")
        if self.shrink and (self.granularity != "unit" or not self.fraction):
            raise ValueError("shrink=True takes pruned units out: pass --granularity unit and a --fraction above 0.")
        if self.timed_rounds < 1:
            raise ValueError(f"timed_rounds={self.timed_rounds}: expected 1 or more.")

    @property
    def selection(self) -> dict[str, Any]:
        """The options that `prune` and `pruning_curve` share."""
        names = ("granularity", "scope", "target_modules", "exclude_modules")
        return {name: getattr(self, name) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = (TaskModelOptions, CheckpointTaskOptions, PruneOptions, EfxArguments)
    parser = OptionParser(options, None, "prune.py", "Prunes a checkpoint, and shows how it stands that.")
    parser.set_defaults(**program_defaults(), output_dir="runs/pruned")
    model_options, task_options, pruning, args = parser.read(argv)
    set_up_logging(args)
    keep_card, args.model_card = args.model_card, False  # the card below says more than one written on a push
    try:
        trainer, task = _load(model_options, task_options, args, pruning.plot)
        model: Any = trainer.model
        if pruning.fraction:  # what can't be pruned shows before the curve is drawn
            PruningPlan.of(model, **pruning.selection).changes(pruning.fraction)
        curve = pruning_curve(
            model,
            lambda model: _evaluate(trainer, task),
            pruning.fractions,
            metric=task.metric,
            higher_is_better=task.higher_is_better,
            **pruning.selection,
        )
        if trainer.is_world_process_zero():
            _write_curve(Path(str(args.output_dir)), curve, pruning.plot)
        rows, report = _pruned(trainer, task, pruning)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    if pruning.fraction:
        trainer.save_model(_internal_call=True)
    if trainer.is_world_process_zero():
        folder = Path(str(args.output_dir))
        if report is not None:
            task.save_processor(folder)
            rows[-1]["file_bytes"] = _weight_bytes(folder)
            print(report)
        command = ["scripts/prune.py", *argv]
        settings = {"model": model_options.model_name_or_path, **data_settings(task_options, task)}
        settings |= {"fraction": pruning.fraction, "shrink": pruning.shrink, **pruning.selection}
        results = _write_results(folder, trainer, task, curve, rows, settings, command, pruning.plot)
        if report is not None and keep_card:
            _write_card(folder, trainer, task, curve, rows[-1], settings, summary_table(results), pruning.plot)
        print_results(results)
        print(f"checkpoint: {folder}" if report is not None else f"nothing was pruned for good; the curve: {folder}")
    if pruning.fraction:
        push_and_end(trainer)
    else:
        end_processes()
    return 0


def _load(
    model_options: TaskModelOptions, task_options: CheckpointTaskOptions, args: Any, plot: bool
) -> tuple[EfxTrainer, LearningTask]:
    name = model_options.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path is missing: name the checkpoint to prune with --model.")
    if plot:
        matplotlib_pyplot()
    task_options = task_options.of_checkpoint(name)  # a wrong name shows before the data is read
    with args.main_process_first(desc="loading the data"):
        task = load_task(task_options, name)
    Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
    model = task.model_init(args.seed, model_options, trained=True)
    return EfxTrainer(model, args, train_dataset=task.train, **task.trainer_parts), task


def _evaluate(trainer: EfxTrainer, task: LearningTask) -> dict[str, float]:
    """The model's figures on the validation data, by their plain names."""
    figures: Any = trainer.predict(task.validation, metric_key_prefix="eval").metrics  # pyright: ignore
    wanted = ("loss", "accuracy", "perplexity", "bits_per_byte")
    return {name: figures[f"eval_{name}"] for name in wanted if f"eval_{name}" in figures}


def _pruned(
    trainer: EfxTrainer, task: LearningTask, options: PruneOptions
) -> tuple[list[dict[str, Any]], PruningReport | None]:
    """Prunes and shrinks the Trainer's model; the figures of the dense model and of what it became."""
    model: Any = trainer.model
    rows = [{"configuration": "as it was", **_evaluate(trainer, task), **_sizes(model)}]
    with tempfile.TemporaryDirectory(dir=str(trainer.args.output_dir)) as folder:
        model.save_pretrained(folder)
        rows[0]["file_bytes"] = _weight_bytes(Path(folder))
    if not options.fraction:
        return rows, None
    dense = copy.deepcopy(model)  # so that the two are timed in turn
    report = prune(model, options.fraction, **options.selection)
    name = f"{options.fraction:.4g} pruned"
    if options.shrink:
        shrink(model)
        name += ", shrunk"
    rows.append({"configuration": name, **_evaluate(trainer, task), **_sizes(model)})
    loader = trainer.get_train_dataloader()
    batch = trainer._prepare_inputs(next(iter(loader)))
    for row, seconds in zip(rows, _step_seconds([dense, model], batch, options.timed_rounds), strict=True):
        row["training_step_seconds"], row["forward_seconds"] = seconds
    return rows, report


def _sizes(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in parameters)
    return {"parameters": sum(p.numel() for p in parameters), "nonzero_parameters": nonzero}


def _weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _step_seconds(models: Sequence[nn.Module], batch: Mapping[str, Any], rounds: int) -> list[tuple[float, float]]:
    """Median seconds of each model's forward and backward pass, and of its forward pass in evaluation, on one batch.

    The models take turns, after one round to warm up, so that a machine that slows down slows all of them.
    """
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    for i in range(rounds + 1):
        for model, (training, forward) in zip(models, times, strict=True):
            parameters = [p for p in model.parameters() if p.requires_grad]
            model.train()
            start = _now()
            torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
            middle = _now()
            model.eval()
            with torch.no_grad():
                model(**batch)
            end = _now()
            if i:
                training.append(middle - start)
                forward.append(end - middle)
    return [(statistics.median(training), statistics.median(forward)) for training, forward in times]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _write_curve(folder: Path, curve: PruningCurve, plot: bool) -> None:
    write_atomically(folder / CURVE, json.dumps(curve.to_dict(), indent=1) + "\n")
    if plot:
        curve.plot(folder / PLOT)


def _write_results(
    folder: Path,
    trainer: EfxTrainer,
    task: LearningTask,
    curve: PruningCurve,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    command: Sequence[str],
    plot: bool,
) -> dict[str, Any]:
    points = [{"configuration": f"curve: {f:.4g} pruned", task.metric: value} for f, value in curve.points]
    columns = [{"key": task.metric, "title": task.metric, "format": ".4g"}]
    for key, spec in (
        ("parameters", "d"),
        ("nonzero_parameters", "d"),
        ("file_bytes", "d"),
        ("training_step_seconds", ".4g"),
        ("forward_seconds", ".4g"),
    ):
        if key in rows[-1]:
            columns.append({"key": key, "title": key.replace("_", " "), "format": spec})
    seed = trainer.args.seed
    return write_results(
        folder / RESULTS,
        title=f"Pruning on {task.name}",
        command=public_command(command),
        data={"name": task.name, "fingerprint": data_fingerprint(task.train, task.fingerprint_columns)},
        seeds=[seed],
        rows=[{**row, "seed": seed} for row in (*rows, *points)],
        claims=[],
        columns=columns,
        settings=settings,
        plot=PLOT if plot else None,
    )


def _write_card(
    folder: Path,
    trainer: EfxTrainer,
    task: LearningTask,
    curve: PruningCurve,
    row: Mapping[str, Any],
    settings: Mapping[str, Any],
    comparison: Any,
    plot: bool,
) -> None:
    """Writes the card of the checkpoint."""
    data: dict[str, Any] = {"dataset_type": re.sub(r"[^\w.-]+", "-", task.name), "dataset_name": task.name}
    data |= {"task_type": task.pipeline_tag, "dataset_split": "validation"}
    own = EvalResult(metric_type=task.metric, metric_value=row[task.metric], **data)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    methods = [entry["method"] for entry in (efx_record(model) or {"methods": []})["methods"]]
    what = "taken out" if settings["shrink"] else "set to zero: they take as many bytes and as much time as others"
    parts = {"model_name": folder.resolve().name, "repo_id": None if folder.is_absolute() else folder.as_posix()}
    if trainer.args.push_to_hub:
        parts = {"repo_id": trainer.hub_model_id, "model_name": str(trainer.hub_model_id).rpartition("/")[2]}
    write_model_card(
        folder,
        methods=methods,
        results=[own, *curve.to_eval_results(**data)],
        description=(
            f"A {model.config.model_type} model of {row['parameters']:,} parameters, {row['nonzero_parameters']:,} of "
            f"them not zero. Of the layers' {settings['granularity']}s {settings['fraction']:.4g} were pruned by "
            f"magnitude, without training afterwards, and {what}. The curve shows the model as it was, pruned by "
            f"other shares."
        ),
        auto_class=task.auto_class,
        needs_hf_efx=any(config_class(name).changes_skeleton for name in methods),
        configuration={"pruning": settings},
        comparison=comparison,
        plot=PLOT if plot else None,
        citations=[METHODS[name].citation for name in dict.fromkeys([*methods, "targeted_dropout"])],
        tags=["pruned"],
        pipeline_tag=task.pipeline_tag,
        **parts,
    )
