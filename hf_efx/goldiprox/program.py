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
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.results.plots import matplotlib_pyplot
from hf_efx.core.training.checkpoints import last_complete_checkpoint
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.goldiprox.replay import ReplayTrainer
from hf_efx.goldiprox.sequence import SelectionSequence
from hf_efx.goldiprox.trainer import GoldiProxTrainer
from hf_efx.programs.command_line import OptionParser, resume_point
from hf_efx.programs.model_options import checkpoint_config
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_run import (
    RUN,
    Run,
    RunOptions,
    compared_arguments,
    data_settings,
    end_processes,
    program_defaults,
    push_and_end,
    set_up_logging,
    write_runs,
)
from hf_efx.programs.tasks import SIDE_MODEL_HELP, LearningTask, TaskModelOptions, TaskOptions
from hf_efx.rho_loss.arguments import RHOLossArguments
from hf_efx.rho_loss.irreducible_run import IrreducibleOptions, how_made, with_holdout_share
from hf_efx.rho_loss.program import prepare, run_settings, train_run

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
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: expected 1 or more.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = (TaskModelOptions, TaskOptions, IrreducibleOptions, SelectOptions, RunOptions, RHOLossArguments)
    parser = OptionParser(options, None, "hf-efx goldiprox", (__doc__ or "").splitlines()[0])
    parser.set_defaults(**program_defaults(), output_dir="runs/goldiprox", selection_scope="global")
    model_options, task_options, irreducible, select, run_options, args = parser.read(argv)
    set_up_logging(args)
    keep_card, args.model_card = args.model_card, False  # the card below says more than one written on a push
    trainer, runs, notes = None, [], []
    try:
        if run_options.plot:
            matplotlib_pyplot()
        if select.do == "replay":
            sequence = load_sequence(select.sequence)
            task = _task_of(sequence, model_options, task_options, args)
        else:
            task, sequence, seconds, notes = _select(model_options, task_options, irreducible, select, args)
        if select.do != "select":
            trainer, run = _replay(task, sequence, model_options, args)
            runs = [run]
            if select.do == "both":
                run.figures |= seconds
            if select.compare_uniform:
                runs.append(_uniform(task, model_options, args, run.figures["steps"]))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    if trainer is None:
        end_processes()
        return 0
    if trainer.is_world_process_zero():
        write_runs(
            Path(str(args.output_dir)),
            "goldiprox",
            runs,
            trainer,
            task,
            command=["-m", "hf_efx.cli", "goldiprox", *argv],
            plot=run_options.plot,
            card=keep_card,
            configuration={
                "sequence": sequence.digest,
                **sequence.settings["score"],
                "proxy": sequence.settings["proxy"],
            },
            settings=data_settings(task_options, task),
            baseline="uniform" if len(runs) > 1 else None,
            note=" ".join([*notes, f"It was trained on {sequence!r}, in its order, and scored nothing."]),
        )
        print(f"checkpoint: {args.output_dir}")
    push_and_end(trainer)
    return 0


def load_sequence(source: str) -> SelectionSequence:
    """A sequence from a folder or the Hub.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If it is no sequence, or a damaged one.
    """
    local = Path(source).expanduser().is_dir() or source.startswith((".", "/", "~"))
    return SelectionSequence.load_from_disk(source) if local else SelectionSequence.from_hub(source)


def _task_of(
    sequence: SelectionSequence, model_options: TaskModelOptions, task_options: TaskOptions, args: Any
) -> LearningTask:
    """The task in the split that the sequence was selected from."""
    if model_options.model_name_or_path:  # a wrong name shows before the data is read
        checkpoint_config(model_options.model_name_or_path)
    table = sequence.settings["score"].get("irreducible_losses")
    with args.main_process_first(desc="loading the data"):
        return load_task(with_holdout_share(task_options, table), model_options.model_name_or_path)


def _select(
    model_options: TaskModelOptions,
    task_options: TaskOptions,
    irreducible: IrreducibleOptions,
    select: SelectOptions,
    args: Any,
) -> tuple[LearningTask, SelectionSequence, dict[str, float], list[str]]:
    """Trains the proxy; saves, draws and pushes what it selected.

    Returns:
        The task, the sequence, the seconds of the table and of the proxy, and a note for cards.
    """
    task, table, seconds = prepare(model_options, task_options, irreducible, args, [args.selection])
    folder = Path(str(args.output_dir))
    changed: dict[str, Any] = {"push_to_hub": False, "report_to": [], "resume_from_checkpoint": None}
    own = dataclasses.replace(args, output_dir=str(folder / SELECTING), eval_strategy="no", **changed)
    settings = {**run_settings(own), "num_steps": select.num_steps, "proxy_model": select.proxy_model}
    settings["data"] = data_fingerprint(task.train, task.fingerprint_columns)
    notes = [how_made(table)] if table is not None else []
    resume = resume_point(args.resume_from_checkpoint) is not None
    if resume and (done := Run.load(folder / SELECTING, settings)):
        return task, SelectionSequence.load_from_disk(folder / SEQUENCE), done.figures, notes
    trainer = GoldiProxTrainer(
        task.side_model(select.proxy_model, args.seed + 2),
        own,
        train_dataset=task.train,
        irreducible_losses=table,
        **task.trainer_parts,
    )
    if not resume and trainer.is_world_process_zero():
        (folder / SELECTING / RUN).unlink(missing_ok=True)  # of another run
    begun = resume and last_complete_checkpoint(folder / SELECTING) is not None
    start = time.perf_counter()
    sequence = trainer.select(select.num_steps, resume_from_checkpoint=begun or None)
    figures = {"irreducible_seconds": seconds, "selecting_seconds": time.perf_counter() - start}
    if trainer.is_world_process_zero():
        sequence.save_to_disk(folder / SEQUENCE)
        Run("selection", figures, []).save(folder / SELECTING, settings)
        print(
            f"{sequence!r}\nselected in {figures['selecting_seconds']:.1f} s, irreducible losses in {seconds:.1f} s\n"
            f"sequence: {folder / SEQUENCE}"
        )
        if select.push_sequence_to:
            print(f"pushed: {sequence.push_to_hub(select.push_sequence_to).commit_url}")
    trainer.accelerator.wait_for_everyone()
    return task, sequence, figures, notes


def _replay(
    task: LearningTask, sequence: SelectionSequence, model_options: TaskModelOptions, args: Any
) -> tuple[ReplayTrainer, Run]:
    """Trains the model on the sequence; a finished run is taken from the folder where a run is resumed."""
    folder, resume = Path(str(args.output_dir)), resume_point(args.resume_from_checkpoint)
    settings = {**run_settings(args), "sequence": sequence.digest}
    done = Run.load(folder, settings) if resume is True else None
    if resume is True and last_complete_checkpoint(folder) is None:
        resume = None  # it was interrupted while it selected
    if done is not None:
        model_options = TaskModelOptions(model_name_or_path=str(folder))
    trainer = ReplayTrainer(
        task.model_init(args.seed, model_options),
        args,
        train_dataset=task.train,
        sequence=sequence,
        callbacks=[TrainingClock()],
        **task.trainer_parts,
    )
    return trainer, done or train_run("goldiprox", trainer, task, resume, save=True, settings=settings)


def _uniform(task: LearningTask, model_options: TaskModelOptions, args: Any, steps: int) -> Run:
    """The model trained by a plain Trainer on random examples."""
    own = compared_arguments(args, "uniform", max_steps=steps)
    folder = Path(str(own.output_dir))
    resume = resume_point(args.resume_from_checkpoint) is not None
    if resume and (done := Run.load(folder, run_settings(own))):
        return done
    trainer = EfxTrainer(
        task.model_init(args.seed, model_options),
        own,
        train_dataset=task.train,
        callbacks=[TrainingClock()],
        **task.trainer_parts,
    )
    return train_run("uniform", trainer, task, resume and last_complete_checkpoint(folder) is not None)
