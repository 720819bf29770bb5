"""The programs `hf-efx targeted-dropout`, which trains a model that stands pruning, and scripts/prune.py.

    hf-efx targeted-dropout --task image_classification --compare none dropout       # bundled digits, no file needed
    hf-efx targeted-dropout --task causal_lm --granularity unit --targeting 0.5 --target_modules c_fc
    hf-efx targeted-dropout --config run.yaml --targeting 0.98 --rate 0.99 --ramp paper --fractions 0.9 0.98
    accelerate launch scripts/train_targeted_dropout.py --config run.yaml

Each trained model is evaluated pruned, by the criterion that it was trained with; nothing is pruned for good: that
does

    python scripts/prune.py --model runs/targeted_dropout                       # the curve alone
    python scripts/prune.py --model runs/targeted_dropout --fraction 0.9        # and a checkpoint of zeros
    python scripts/prune.py --model gpt2 --task causal_lm --dataset my_text.jsonl --granularity unit \\
        --target_modules c_fc --fraction 0.5 --shrink                           # and a smaller one

"Learning Sparse Networks Using Targeted Dropout", Gomez et al. 2019, arXiv 1905.13678.
"""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import EvalResult

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.files import write_atomically
from hf_efx.core.model.adapter import get_efx_model, unload
from hf_efx.core.model.record import config_class, efx_record
from hf_efx.core.results.card import write_model_card
from hf_efx.core.results.curves import PruningCurve, check_fractions, plot_curves
from hf_efx.core.results.evidence import print_results, summary_table, write_results
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.programs.command_line import was_given
from hf_efx.programs.frame import not_the_input, run_program
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_report import RESULTS, Report, card_names, evaluated_on, own_fields, report_runs
from hf_efx.programs.task_run import (
    CompareOptions,
    PlannedRun,
    TaskJob,
    data_settings,
    program_defaults,
    save_model,
    task_trainer,
)
from hf_efx.programs.tasks import CheckpointTaskOptions, LearningTask, TaskModelOptions, TaskOptions
from hf_efx.registry import METHODS
from hf_efx.targeted_dropout.callback import TargetedDropoutCallback
from hf_efx.targeted_dropout.config import TargetedDropoutConfig
from hf_efx.targeted_dropout.cost import sizes, step_seconds, weight_bytes
from hf_efx.targeted_dropout.curve import pruning_curve
from hf_efx.targeted_dropout.prune_options import PLOT, PruneOptions
from hf_efx.targeted_dropout.pruning import PruningPlan, PruningReport, prune
from hf_efx.targeted_dropout.shrink import shrink

CURVES, CURVE = "pruning_curves.png", "pruning_curve.json"  # of training, of scripts/prune.py


@dataclass
class ProgramOptions(CompareOptions):
    """What the program does beside training."""

    comparisons: ClassVar = ("none", "l1", "dropout")

    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Runs beside it, from the same weights and for as many steps: 'none', 'l1' (--compare_l1) or "
            "'dropout', plain dropout of the same weights or units (--compare_rate). Each costs a run."
        },
    )
    # Strength and rate as in scripts/reproduce/targeted_dropout.py.
    compare_l1: float = field(
        default=1e-5,
        metadata={"help": "Strength of the L1 penalty of --compare l1: higher prunes better, fits worse."},
    )
    compare_rate: float = field(
        default=0.5,
        metadata={"help": "Rate of --compare dropout: higher prunes better, up to a point, and fits worse."},
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.75, 0.9, 0.95],
        metadata={"help": "Shares pruned at which each trained model is evaluated; each costs an evaluation."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for run, name in (("l1", "compare_l1"), ("dropout", "compare_rate")):
            if run not in self.compare and was_given(self, name):
                raise ValueError(f"{name}={getattr(self, name)} goes with --compare {run}.")
        self.fractions = list(check_fractions(self.fractions))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hf-efx targeted-dropout`, as `run_program` says."""
    return run_program(
        _train,
        argv,
        prog="hf-efx targeted-dropout",
        description="Trains a text, image or causal language model that stands pruning.",
        options=(TaskModelOptions, TaskOptions, ProgramOptions, EfxArguments),
        config=TargetedDropoutConfig,
        **{**program_defaults(), "output_dir": "runs/targeted_dropout", "num_train_epochs": 5},
    )


def _train(
    command: str,
    model_options: TaskModelOptions,
    task_options: TaskOptions,
    program: ProgramOptions,
    args: EfxArguments,
    config: TargetedDropoutConfig,
) -> None:
    job = TaskJob.load("targeted_dropout", command, args, task_options, model_options, program.plot)
    modules = list(config.match(unload(job.model())))  # one list for all runs, whatever each is trained with

    def plan(name: str, args: Any, own: TargetedDropoutConfig | None) -> PlannedRun:
        def trainer(args: Any) -> EfxTrainer:
            model = unload(job.model())  # what a checkpoint says of training before gives way to the config
            callbacks = [TargetedDropoutCallback()] if own else []
            return task_trainer(job.task, EfxTrainer, get_efx_model(model, own) if own else model, args, callbacks)

        def pruned(trainer: EfxTrainer) -> dict[str, float]:
            return _pruned(trainer, job.task, config, modules, program.fractions)

        settings = {"method": own and own.method_fields(), "fractions": program.fractions}
        settings["criterion"] = config.method_fields()
        return PlannedRun(name, args, trainer, settings, pruned)

    beside = [plan(name, job.beside(name), _compared(name, config, program)) for name in program.compare]
    trainer, runs = job.train(plan("targeted_dropout", args, config), beside)
    if program.plot and trainer.is_world_process_zero():
        curves = {run.name: _curve(run.figures, job.task, program) for run in runs}
        plot_curves(curves, job.folder / CURVES)
    columns = [(_key(fraction), f"{fraction:.0%} pruned", ".4g") for fraction in program.fractions]
    report = Report(
        configuration=own_fields(config),
        note="Nothing is pruned yet: this is an ordinary dense model, made to stand it.",
        baseline=program.baseline,
        columns=[{"key": key, "title": title, "format": spec} for key, title, spec in columns],
    )
    report_runs(job, trainer, runs, report)
    if trainer.is_world_process_zero():
        print(f"to prune it: python scripts/prune.py --model {job.folder} --fraction ...")


def _compared(name: str, config: TargetedDropoutConfig, program: ProgramOptions) -> TargetedDropoutConfig | None:
    """What a compared run trains with; None for nothing."""
    if name == "none":
        return None
    plain = TargetedDropoutConfig()  # what says how weights are targeted is left at its default
    changed: dict[str, Any] = {key: getattr(plain, key) for key in ("targeting", "refresh_every", "selection")}
    if name == "l1":
        changed |= {"rate": 0.0, "l1": program.compare_l1}
    else:
        changed |= {"rate": program.compare_rate, "l1": 0.0, "selection": "random"}
    return dataclasses.replace(config, ramp=plain.ramp, ramp_steps=None, **changed)


def _pruned(
    trainer: EfxTrainer,
    task: LearningTask,
    config: TargetedDropoutConfig,
    modules: list[str],
    fractions: Sequence[float],
) -> dict[str, float]:
    """The metric at each share pruned: of every run in the same modules, by the criterion of the program's config."""
    curve = pruning_curve(
        trainer.accelerator.unwrap_model(trainer.model),
        lambda model: _evaluate(trainer, task),
        fractions,
        granularity=config.granularity,  # pyright: ignore[reportArgumentType]
        scope=config.scope,  # pyright: ignore[reportArgumentType]
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        target_modules=modules,
        blocks=config.blocks,
    )
    return {_key(fraction): value for fraction, value in curve.points}


def _curve(figures: Mapping[str, Any], task: LearningTask, program: ProgramOptions) -> PruningCurve:
    points = tuple((fraction, figures[_key(fraction)]) for fraction in program.fractions)
    return PruningCurve(points, task.metric, task.higher_is_better)


def _key(fraction: float) -> str:
    return f"pruned_{100 * fraction:g}"


def _evaluate(trainer: EfxTrainer, task: LearningTask) -> dict[str, float]:
    """Figures of the validation set, without a row in the log."""
    metrics: Any = trainer.predict(task.validation, metric_key_prefix="eval").metrics  # pyright: ignore[reportArgumentType]
    return {name: metrics[f"eval_{name}"] for name in ("loss", *task.metrics)}


def prune_main(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/prune.py, as `run_program` says."""
    return run_program(
        _prune,
        argv,
        prog="prune.py",
        description="Prunes a checkpoint, and shows how it stands that.",
        options=(TaskModelOptions, CheckpointTaskOptions, PruneOptions, EfxArguments),
        trains=False,
        **{**program_defaults(), "output_dir": "runs/pruned"},
    )


def _prune(
    command: str,
    model_options: TaskModelOptions,
    task_options: CheckpointTaskOptions,
    pruning: PruneOptions,
    args: EfxArguments,
) -> None:
    if not model_options.model_name_or_path:
        raise ValueError("model_name_or_path is missing: name the checkpoint to prune with --model.")
    card, args.model_card = args.model_card, False  # ours says more than one written on a push
    task_options = task_options.of_checkpoint(model_options.model_name_or_path)
    task, trainer = _load_checkpoint(model_options, task_options, args)
    model: Any = trainer.model
    folder = Path(str(args.output_dir))
    plan = PruningPlan.of(model, **pruning.selection)
    if pruning.shrink and (plan.granularity != "unit" or not pruning.fraction):
        raise ValueError("shrink=True takes pruned units out: pass --granularity unit and a --fraction above 0.")
    if pruning.fraction:  # what can't be pruned or taken out shows before the curve is drawn
        plan.changes(pruning.fraction)
    if pruning.shrink and pruning.fraction:
        trial = copy.deepcopy(model)
        prune(trial, pruning.fraction, **pruning.selection)
        shrink(trial)
    curve = pruning_curve(
        model,
        lambda model: _evaluate(trainer, task),
        pruning.fractions,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        **pruning.selection,
    )
    if trainer.is_world_process_zero():
        write_atomically(folder / CURVE, json.dumps(curve.to_dict(), indent=1) + "\n")
        if pruning.plot:
            curve.plot(folder / PLOT)
    settings = {"model": model_options.model_name_or_path, **data_settings(task_options, task)}
    settings |= {"fraction": pruning.fraction, "shrink": pruning.shrink, **pruning.selection}
    settings |= {"granularity": plan.granularity, "scope": plan.scope}
    rows, report = _pruned_rows(trainer, task, pruning)
    with not_the_input("saving"):
        if report is not None:
            save_model(trainer, task)
            rows[-1]["file_bytes"] = weight_bytes(folder)
        if trainer.is_world_process_zero():
            results = _write_results(command, trainer, task, [*rows, *_points(curve)], settings, pruning.plot)
            if report is not None and card:
                _write_card(trainer, task, curve, rows[-1], settings, summary_table(results), pruning.plot)
            print(report or "nothing was pruned for good", f"\n{'checkpoint' if report else 'the curve'}: {folder}")
        if report is not None and args.push_to_hub:
            trainer.push_to_hub()
        trainer.accelerator.wait_for_everyone()  # the first process wrote meanwhile; groups end together


def _load_checkpoint(
    model_options: TaskModelOptions, task_options: CheckpointTaskOptions, args: EfxArguments
) -> tuple[LearningTask, EfxTrainer]:
    name = str(model_options.model_name_or_path)
    with args.main_process_first(desc="loading the data"):
        task = load_task(task_options, name)
    model = task.model_init(args.seed, model_options, trained=True)
    return task, task_trainer(task, EfxTrainer, model, args)


def _pruned_rows(
    trainer: EfxTrainer, task: LearningTask, options: PruneOptions
) -> tuple[list[dict[str, Any]], PruningReport | None]:
    """Prunes and shrinks the Trainer's model; the figures of the dense model and of what it became."""
    model: Any = trainer.model
    rows = [{"configuration": "as it was", **_evaluate(trainer, task), **sizes(model)}]
    with tempfile.TemporaryDirectory(dir=str(trainer.args.output_dir)) as folder:
        model.save_pretrained(folder)
        rows[0]["file_bytes"] = weight_bytes(Path(folder))
    if not options.fraction:
        return rows, None
    dense = copy.deepcopy(model)  # so that the two are timed in turn
    report = prune(model, options.fraction, **options.selection)
    name = f"{options.fraction:.4g} pruned"
    if options.shrink:
        shrink(model)
        name += ", shrunk"
    rows.append({"configuration": name, **_evaluate(trainer, task), **sizes(model)})
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for row, seconds in zip(rows, step_seconds([dense, model], batch, options.timed_rounds), strict=True):
        row["training_step_seconds"], row["forward_seconds"] = seconds
    return rows, report


def _points(curve: PruningCurve) -> list[dict[str, Any]]:
    return [{"configuration": f"curve: {f:.4g} pruned", curve.metric: value} for f, value in curve.points]


def _write_results(
    command: str,
    trainer: EfxTrainer,
    task: LearningTask,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    plot: bool,
) -> dict[str, Any]:
    shown = [(task.metric, ".4g"), ("parameters", "d"), ("nonzero_parameters", "d"), ("file_bytes", "d")]
    shown += [("training_step_seconds", ".4g"), ("forward_seconds", ".4g")]
    there = {key for row in rows for key in row}
    results = write_results(
        Path(str(trainer.args.output_dir)) / RESULTS,
        title=f"Pruning on {task.name}",
        command=command,
        data={"name": task.name, "fingerprint": data_fingerprint(task.train, task.fingerprint_columns)},
        seeds=[trainer.args.seed],
        rows=[{**row, "seed": trainer.args.seed} for row in rows],
        claims=[],
        columns=[{"key": k, "title": k.replace("_", " "), "format": spec} for k, spec in shown if k in there],
        settings=settings,
        plot=PLOT if plot else None,
    )
    print_results(results)
    return results


def _write_card(
    trainer: EfxTrainer,
    task: LearningTask,
    curve: PruningCurve,
    row: Mapping[str, Any],
    settings: Mapping[str, Any],
    comparison: Any,
    plot: bool,
) -> None:
    """Writes the card of the checkpoint."""
    data = evaluated_on(task)
    own = EvalResult(metric_type=task.metric, metric_value=row[task.metric], **data)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    methods = [entry["method"] for entry in (efx_record(model) or {"methods": []})["methods"]]
    what = "taken out" if settings["shrink"] else "set to zero: they take as many bytes and as much time as others"
    folder = Path(str(trainer.args.output_dir))
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
        **card_names(folder, trainer),
    )
