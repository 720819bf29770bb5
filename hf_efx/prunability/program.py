"""The program `hf-efx prunability`: measures how much of a checkpoint's weights its training loss can do without.

    hf-efx prunability --model you/model --task text_classification --dataset reviews.csv
    hf-efx prunability --model runs/a --compare runs/b runs/c --task causal_lm --dataset my_text.jsonl
    hf-efx prunability --model runs/a --task image_classification --dataset fashion_mnist/ --baselines

"Robustness to Pruning Predicts Generalization in Deep Neural Networks", Kuhn et al. 2021, arXiv 2103.06002.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.results.evidence import print_results, write_results
from hf_efx.programs.frame import not_the_input, run_program
from hf_efx.programs.model_options import checkpoint_config, computing_device
from hf_efx.programs.run_folder import data_of_run
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_run import data_settings
from hf_efx.programs.tasks import CheckpointTaskOptions, LearningTask, TaskModelOptions
from hf_efx.prunability.baselines import Network, baseline_measures
from hf_efx.prunability.measure import PrunabilityResult, measure_prunability
from hf_efx.prunability.sample import Sample, check_whole_number

RESULTS, PLOT = "results.json", "prunability.png"


@dataclass
class PrunabilityOptions:
    """What is measured, and where it is written."""

    tolerance: float = field(  # 10%, as the paper is remembered to have it
        default=0.1,
        metadata={
            "help": "By how much the training loss may rise. More prunes deeper and gives a steadier figure, which "
            "asks less of the model."
        },
    )
    tolerance_mode: Literal["relative", "absolute"] = field(
        default="relative",
        metadata={
            "help": "'relative' to the loss, or 'absolute'. Of a loss near 0 a relative tolerance is near 0 too, and "
            "the figure noisy; an absolute one is easier for a model with a lower loss."
        },
    )
    criterion: Literal["magnitude", "random"] = field(
        default="magnitude",
        metadata={"help": "'magnitude' prunes the smallest weights, 'random' any: nearly nothing may go then."},
    )
    scope: Literal["global", "layer"] = field(
        default="global",
        metadata={
            "help": "'global' ranks all weights together, and may empty a layer whose weights are small; 'layer' "
            "keeps the same fraction of each tensor."
        },
    )
    embeddings: bool = field(
        default=False,
        metadata={"help": "Rank embedding tables too, and with them a tied output layer: another figure altogether."},
    )
    exhaustive: bool = field(
        default=False,
        metadata={"help": "Evaluate all of the grid: right also where the loss isn't monotone, at 11 times the cost."},
    )
    samples: int = field(
        default=1000,
        metadata={"help": "Training examples of the sample: more narrow the interval, and cost their forward passes."},
    )
    batch_size: int = field(
        default=64, metadata={"help": "Examples a forward pass: more is faster and takes more memory."}
    )
    seed: int = field(default=0, metadata={"help": "Of the sample, the random criterion and the bootstrap."})
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Checkpoints to measure beside it, on the same sample (of text: with the same tokenizer). They "
            "compare where their training losses are much the same."
        },
    )
    baselines: bool = field(
        default=False,
        metadata={"help": "Compute the other measures too (norms, margin, flatness, ...): some 500 forward passes."},
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Where to compute, such as 'cpu'. Without it: the accelerator, if there is one."},
    )
    output_dir: str = field(default="runs/prunability", metadata={"help": f"Folder of {RESULTS} and {PLOT}."})
    plot: bool = field(
        default=True, metadata={"help": f"Draw the loss over the fraction kept into {PLOT}; needs matplotlib."}
    )

    def __post_init__(self) -> None:
        check_whole_number("samples", self.samples, 2)  # of one there is no interval
        check_whole_number("batch_size", self.batch_size, 1)
        check_whole_number("seed", self.seed, 0)
        computing_device(self.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, as `run_program` says."""
    return run_program(
        _program,
        argv,
        prog="hf-efx prunability",
        description=__doc__,
        options=(TaskModelOptions, CheckpointTaskOptions, PrunabilityOptions),
    )


def _program(
    command: str,
    model_options: TaskModelOptions,
    task_options: CheckpointTaskOptions,
    options: PrunabilityOptions,
) -> None:
    name = model_options.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing: name a trained checkpoint with --model.")
    task_options = task_options.of_checkpoint(name)
    for one in options.compare:  # a wrong name shows before the data is read
        checkpoint_config(one)
    task = load_task(task_options, name)
    data = data_fingerprint(task.train)
    for one in (name, *options.compare):
        if data_of_run(one)[1] not in (None, data):
            print(f"{one} is measured on other data than it was trained on: its loss isn't a training loss")
    # One sample for all: their losses must be of the same examples.
    sample = Sample(task.train, options.samples, options.seed, task.data_collator, task.loss_task, options.batch_size)
    measured = {one: _measure(one, task, sample, options) for one in dict.fromkeys((name, *options.compare))}
    with not_the_input("writing the results"):
        _write(measured, task, options, data_settings(task_options, task), command)


def _measure(
    name: str, task: LearningTask, sample: Sample, options: PrunabilityOptions
) -> tuple[PrunabilityResult, dict[str, float]]:
    """Loads a checkpoint and measures it; the figures are those of the other measures and the seconds."""
    model: Any = task.side_model(name, options.seed, trained=True)
    model.to(computing_device(options.device))
    names = ("tolerance", "criterion", "scope", "tolerance_mode", "exhaustive", "seed", "embeddings")
    start = time.perf_counter()
    result = measure_prunability(model, sample, **{key: getattr(options, key) for key in names})
    figures = {"seconds": time.perf_counter() - start}
    if options.baselines:
        network = Network(model, sample.outcome, seed=options.seed, tolerance=options.tolerance)
        figures |= baseline_measures(network)
    print(f"{name}: {result}")
    return result, figures


def _write(
    measured: dict[str, tuple[PrunabilityResult, dict[str, float]]],
    task: LearningTask,
    options: PrunabilityOptions,
    data: dict[str, Any],
    command: str,
) -> None:
    """Results and plot; the plot is that of the first checkpoint."""
    folder = Path(options.output_dir)
    rows = []
    for name, (result, figures) in measured.items():
        low, high = result.interval or (None, None)
        row = {"prunability": result.fraction, "low": low, "high": high, "loss": result.loss, "bound": result.bound}
        row |= {"weights": result.weights, "evaluations": result.evaluations, "kept": result.kept}
        curve = result.curve.to_dict()["points"]
        rows.append({"configuration": name, "seed": options.seed, **row, **figures, "curve": curve})
    if options.plot:
        next(iter(measured.values()))[0].plot(folder / PLOT)
    columns = [("prunability", ".2f"), ("low", ".2f"), ("high", ".2f"), ("loss", ".4g"), ("seconds", ".1f")]
    extra = [key for key in rows[0] if options.baselines and key in next(iter(measured.values()))[1]]
    columns += [(key, ".4g") for key in extra if key != "seconds"]
    results = write_results(
        folder / RESULTS,
        title=f"Prunability on {task.name}",
        command=command,
        data={"name": task.name, "fingerprint": data_fingerprint(task.train, task.fingerprint_columns)},
        seeds=[options.seed],
        rows=rows,
        claims=[],
        columns=[{"key": key, "title": key.replace("_", " "), "format": spec} for key, spec in columns],
        settings={**data, **{f.name: getattr(options, f.name) for f in dataclasses.fields(options)}},
        plot=PLOT if options.plot else None,
    )
    print_results(results)
    print(f"results: {folder / RESULTS}")
