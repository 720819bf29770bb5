"""The program `hf-efx goldiprox`: a small proxy selects a training sequence, any model trains on it.

    hf-efx goldiprox --label_noise 0.1 --compare_uniform               # selects, then replays, on Python's own text
    hf-efx goldiprox --do select --num_steps 500 --proxy_model tiny --push_sequence_to you/sequence
    hf-efx goldiprox --do replay --sequence you/sequence --model_type bert --output_dir runs/mine
    accelerate launch scripts/select_goldiprox.py --config run.yaml
    accelerate launch scripts/replay_sequence.py --config run.yaml --sequence runs/goldiprox/sequence

"Prioritized training on points that are learnable, worth learning, and not yet learnt", Mindermann et al. 2021,
arXiv 2107.02565.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_efx.core.data.fingerprints import weights_fingerprint
from hf_efx.core.training.checkpoints import last_complete_checkpoint
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.goldiprox.replay import ReplayTrainer
from hf_efx.goldiprox.sequence import SelectionSequence
from hf_efx.goldiprox.trainer import GoldiProxTrainer
from hf_efx.programs.frame import check_push, not_the_input, run_program
from hf_efx.programs.run_folder import RUN, Run
from hf_efx.programs.task_report import Report, report_runs
from hf_efx.programs.task_run import PlannedRun, RunOptions, TaskJob, program_defaults, task_trainer
from hf_efx.programs.tasks import SIDE_MODEL_HELP, TaskModelOptions, TaskOptions
from hf_efx.rho_loss.arguments import RHOLossArguments
from hf_efx.rho_loss.program import (
    IrreducibleOptions,
    Table,
    load_selecting_job,
    selection_figures,
    with_holdout_share,
)

# In the output folder. The Trainer pushes nothing that begins with an underscore.
SEQUENCE, SELECTING = "sequence", "_selecting"


@dataclass
class SelectOptions:
    """What the program does: select a sequence, replay one, or both in turn."""

    do: Literal["both", "select", "replay"] = field(
        default="both",
        metadata={
            "help": "'select' makes a sequence, 'replay' trains on a ready one, 'both' does one, then the other."
        },
    )
    sequence: str | None = field(
        default=None, metadata={"help": "The sequence to replay: a folder, or a data set on the Hub."}
    )
    num_steps: int = field(
        default=300, metadata={"help": "Optimizer steps to select. More cost the proxy's training, and last longer."}
    )
    proxy_model: str = field(
        default="tiny",
        metadata={"help": "The proxy that selects: " + SIDE_MODEL_HELP + " A smaller one selects faster, less aptly."},
    )
    push_sequence_to: str | None = field(
        default=None, metadata={"help": "Data set on the Hub that the selected sequence is pushed to, with its card."}
    )
    compare_uniform: bool = field(
        default=False,
        metadata={"help": "Train the model on random examples too, from the same weights and for as many steps."},
    )

    def __post_init__(self) -> None:
        if self.do == "replay" and self.sequence is None:
            raise ValueError("do='replay' needs a sequence: a folder, or a data set on the Hub.")
        if self.do != "replay" and self.sequence is not None:
            raise ValueError(f"do={self.do!r} makes a sequence itself, but sequence={self.sequence!r} names one.")
        if self.do == "replay" and self.push_sequence_to is not None:
            raise ValueError(f"do='replay' makes no sequence: leave push_sequence_to={self.push_sequence_to!r} out.")
        if self.do == "select" and self.compare_uniform:
            raise ValueError("do='select' trains no model: leave compare_uniform=True out, or do 'both'.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: expected 1 or more.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, as `run_program` says."""
    return run_program(
        _program,
        argv,
        prog="hf-efx goldiprox",
        description=__doc__,
        options=(TaskModelOptions, TaskOptions, IrreducibleOptions, SelectOptions, RunOptions, RHOLossArguments),
        **{**program_defaults(), "output_dir": "runs/goldiprox", "selection_scope": "global"},
    )


def _program(
    command: str,
    model_options: TaskModelOptions,
    task_options: TaskOptions,
    irreducible: IrreducibleOptions,
    select: SelectOptions,
    run_options: RunOptions,
    args: RHOLossArguments,
) -> None:
    if select.push_sequence_to:
        check_push("push_sequence_to", select.push_sequence_to)
    seconds: dict[str, float] = {}
    notes: list[str] = []
    if select.do == "replay":
        sequence = load_sequence(str(select.sequence))
        options = with_holdout_share(task_options, sequence.settings["score"].get("irreducible_losses"))
        job = TaskJob.load("goldiprox", command, args, options, model_options, run_options.plot)
    else:
        job, table = load_selecting_job(
            "goldiprox", command, args, task_options, model_options, irreducible, [args.selection], run_options.plot
        )
        notes = [table.note] if table.note else []
        sequence, seconds = _select(job, table, select)
    if select.do == "select":
        return

    def replay(args: Any) -> ReplayTrainer:
        return task_trainer(job.task, ReplayTrainer, job.model(), args, sequence=sequence)

    def uniform(args: Any) -> EfxTrainer:
        return task_trainer(job.task, EfxTrainer, job.model(), args)

    if select.do == "both" and job.resume is True and not (job.folder / RUN).is_file():
        args.resume_from_checkpoint = None  # it was cut while it selected
    own = PlannedRun("goldiprox", args, replay, {"sequence": sequence.digest}, selection_figures)
    beside = [PlannedRun("uniform", job.beside("uniform"), uniform)] if select.compare_uniform else []
    trainer, runs = job.train(own, beside)
    runs[0].figures |= seconds
    report = Report(
        configuration={"sequence": sequence.digest, **sequence.settings["score"], "proxy": sequence.settings["proxy"]},
        note=" ".join([*notes, f"It was trained on {sequence!r}, in its order, and scored nothing."]),
        baseline="uniform" if beside else None,
    )
    report_runs(job, trainer, runs, report)


def load_sequence(source: str) -> SelectionSequence:
    """A sequence from a folder or the Hub.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If it is no sequence, or a damaged one.
    """
    local = Path(source).expanduser().is_dir() or source.startswith((".", "/", "~"))
    return SelectionSequence.load_from_disk(source) if local else SelectionSequence.from_hub(source)


def _select(job: TaskJob, table: Table, select: SelectOptions) -> tuple[SelectionSequence, dict[str, float]]:
    """Trains the proxy; saves, draws and pushes what it selected.

    Returns:
        The sequence, and the seconds of the table and of the proxy.
    """
    changed: dict[str, Any] = {"push_to_hub": False, "report_to": [], "resume_from_checkpoint": None}
    folder = str(job.folder / SELECTING)
    args = dataclasses.replace(job.args, output_dir=folder, eval_strategy="no", max_steps=select.num_steps, **changed)
    proxy = job.task.side_model(select.proxy_model, args.seed + 2)
    settings = {"proxy": weights_fingerprint(proxy), "table": table.settings}
    kept = job.folder_of(PlannedRun("selection", args, lambda args: None, settings))
    kept.check(job.resume is not None)
    if job.resume and (done := kept.finished()):
        return SelectionSequence.load_from_disk(job.folder / SEQUENCE), done.figures
    parts = {"train_dataset": job.task.train, "irreducible_losses": table.losses, **job.task.trainer_parts}
    trainer = GoldiProxTrainer(proxy, args, **parts)
    if trainer.is_world_process_zero():
        kept.write()
    begun = job.resume and last_complete_checkpoint(folder) is not None
    start = time.perf_counter()
    sequence = trainer.select(select.num_steps, resume_from_checkpoint=begun or None)
    figures = {"irreducible_seconds": table.seconds, "selecting_seconds": time.perf_counter() - start}
    with not_the_input("saving the sequence"):
        if trainer.is_world_process_zero():
            sequence.save_to_disk(job.folder / SEQUENCE)
            kept.write(Run("selection", figures, []))
            print(f"{sequence!r}\nselected in {figures['selecting_seconds']:.1f} s, irreducible losses in ", end="")
            print(f"{table.seconds:.1f} s\nsequence: {job.folder / SEQUENCE}")
            if select.push_sequence_to:
                print(f"pushed: {sequence.push_to_hub(select.push_sequence_to).commit_url}")
    trainer.accelerator.wait_for_everyone()
    return sequence, figures
