"""Runs on a `LearningTask`, side by side from the same weights: trained, or recognised as finished."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_efx.core.data.example_ids import ID_COLUMN, add_example_ids
from hf_efx.core.data.fingerprints import data_fingerprint, weights_fingerprint
from hf_efx.core.training.checkpoints import last_complete_checkpoint
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.programs.command_line import resume_point
from hf_efx.programs.frame import not_the_input
from hf_efx.programs.model_options import ModelOptions
from hf_efx.programs.run_folder import LENGTH, Run, RunFolder, training_settings
from hf_efx.programs.task_data import load_task
from hf_efx.programs.tasks import LearningTask, TaskModelOptions, TaskOptions

COMPARED = "_compared"  # in the output folder; the Trainer pushes nothing that begins with an underscore


@dataclass
class RunOptions:
    """What a program does beside training."""

    plot: bool = field(
        default=True,
        metadata={"help": "Draw the curves by steps and by seconds into curves.png; needs matplotlib."},
    )


@dataclass
class CompareOptions(RunOptions):
    """`RunOptions` of a program that trains other runs beside its own, from the same weights and for as many steps."""

    comparisons: ClassVar[tuple[str, ...]] = ()

    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Runs beside it, from the same weights and for as many steps. Each costs a run."},
    )

    def __post_init__(self) -> None:
        for i, name in enumerate(self.compare):
            if name not in self.comparisons or name in self.compare[:i]:
                raise ValueError(f"compare={name!r}: expected some of {', '.join(self.comparisons)}, each once.")

    @property
    def baseline(self) -> str | None:
        """The run whose best the others are compared with: the first that is named."""
        return self.compare[0] if self.compare else None


def program_defaults() -> dict[str, Any]:
    """Training arguments where a command line says nothing else, for `run_program`.

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


def task_trainer(
    task: LearningTask, kind: Any, model: Any, args: Any, callbacks: Sequence[Any] = (), **parts: Any
) -> Any:
    """A Trainer of the task, with a `TrainingClock` unless one is among the callbacks."""
    clock = [] if any(isinstance(one, TrainingClock) for one in callbacks) else [TrainingClock()]
    parts = {"train_dataset": task.train, **task.trainer_parts, **parts}
    return kind(model=model, args=args, callbacks=[*callbacks, *clock], **parts)


@dataclass
class PlannedRun:
    """A run that a program is asked for.

    Attributes:
        name: In tables and plots.
        args: Its training arguments.
        trainer: Makes its Trainer from these arguments, model included; `task_trainer` helps.
        settings: The method's settings that the arguments don't hold.
        figures: Gives a method's own figures of the trainer after training, on all processes.
    """

    name: str
    args: Any
    trainer: Callable[[Any], Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Callable[[Any], Mapping[str, Any]] | None = None


@dataclass
class TaskJob:
    """The runs of one program: their task, the model that all start from, and what decides their outcome.

    Attributes:
        method: Its name in the registry.
        command: As others can type it.
        args: The program's training arguments.
        task: The task.
        model_options: Which model.
        settings: Of the data, for results and cards.
        plot: Whether a plot is wanted.
        data: Options that load the data again.
        card: Whether a card is wanted.
        start: What the runs start from, as fingerprints and settings.
    """

    method: str
    command: str
    args: Any
    task: LearningTask
    model_options: ModelOptions
    settings: dict[str, Any]
    plot: bool = True
    data: dict[str, Any] = field(default_factory=dict)
    card: bool = field(init=False)
    start: dict[str, Any] = field(init=False)

    @classmethod
    def load(
        cls,
        method: str,
        command: str,
        args: Any,
        task_options: TaskOptions,
        model_options: ModelOptions,
        plot: bool = True,
    ) -> "TaskJob":
        """Loads the task, of which nothing is held out unless that is asked for.

        Raises:
            ValueError: If data or model can't be used, as `load_task` and `LearningTask.model_init` say.
        """
        options = dataclasses.replace(task_options, holdout_share=task_options.holdout_share or 0.0)
        with args.main_process_first(desc="loading the data"):
            task = load_task(options, model_options.model_name_or_path)
        data = {**dataclasses.asdict(options), "tokenizer": None, "vocab_size": None}  # the checkpoint has its own
        return cls(method, command, args, task, model_options, data_settings(options, task), plot, data)

    def __post_init__(self) -> None:
        self.card, self.args.model_card = self.args.model_card, False  # `write` says more than one written on a push
        _check_arguments(self.args, self.task)
        model = self.model()  # what can't be used shows before anything is trained
        config = model.config.to_dict()
        self.start = {
            "program": self.method,
            "task": self.task.task,
            "data": data_fingerprint(self.task.train),
            "holdout": self.task.holdout and data_fingerprint(self.task.holdout),
            "validation": data_fingerprint(_with_ids(self.task.validation)),
            "weights": weights_fingerprint(model),
            "model": {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")},
        }
        self._check(self._folder_of(self.args, {}))

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(str(self.args.output_dir))

    @property
    def resume(self) -> Any:
        """What `--resume_from_checkpoint` says, as in `Trainer.train`."""
        return resume_point(self.args.resume_from_checkpoint)

    def model(self) -> PreTrainedModel:
        """The model that each run starts from: the same weights at every call."""
        return self.task.model_init(self.args.seed, self.model_options)

    def beside(self, name: str, **changed: Any) -> Any:
        """Arguments of a run beside the program's own, which is kept in a folder below and pushed nowhere."""
        alone: dict[str, Any] = {"push_to_hub": False, "report_to": [], "resume_from_checkpoint": None}
        return dataclasses.replace(self.args, output_dir=str(self.folder / COMPARED / name), **alone, **changed)

    def folder_of(self, plan: PlannedRun) -> RunFolder:
        """Where a run is kept, and what it must share with what lies there."""
        return self._folder_of(plan.args, {"run": plan.name, **plan.settings})

    def _folder_of(self, args: Any, settings: Mapping[str, Any]) -> RunFolder:
        settings = {**self.start, "args": training_settings(args), **settings}
        length = {name: getattr(args, name) for name in LENGTH}
        return RunFolder(Path(str(args.output_dir)), settings, length, self.data)

    def _check(self, own: RunFolder) -> None:
        if not isinstance(self.resume, str):  # a checkpoint that is named is taken, whosever it is
            own.check(self.resume is True)

    def train(self, own: PlannedRun, beside: Sequence[PlannedRun] = ()) -> tuple[Any, list[Run]]:
        """Trains the program's own run and saves its model, then those beside it, for as many steps.

        What is finished in its folder is taken from there, where the program is resumed.

        Returns:
            The Trainer of the program's own run, and the runs, that one first. All processes must call it.

        Raises:
            ValueError: Before the first step, if a run can't be made, or would go on with another's checkpoints.
            RuntimeError: If a run fails after its first step.
        """
        resume = self.resume
        self._check(self.folder_of(own))
        for plan in beside:
            if resume:
                self.folder_of(plan).check(resume=True)
            plan.trainer(plan.args)  # what can't be done shows before anything is trained
        done = self.folder_of(own).finished() if resume is True else None
        if done is None:
            trainer = own.trainer(own.args)
            runs = [self._run(own, trainer, resume, save=True)]
        else:
            saved = self.task.model_init(self.args.seed, TaskModelOptions(model_name_or_path=str(self.folder)))
            trainer, runs = task_trainer(self.task, EfxTrainer, saved, own.args), [done]
            trainer.state = TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME))
        for plan in beside:
            args = dataclasses.replace(plan.args, max_steps=runs[0].figures["steps"])
            plan = dataclasses.replace(plan, args=args)
            folder = self.folder_of(plan)
            finished = folder.finished() if resume else None
            runs.append(finished or self._run(plan, plan.trainer(args), True if resume else None))
        return trainer, runs

    def _run(self, plan: PlannedRun, trainer: Any, resume: Any, save: bool = False) -> Run:
        """Trains, evaluates and, if asked to, saves the model and what makes its inputs."""
        folder = self.folder_of(plan)
        if resume is True and last_complete_checkpoint(folder.path) is None and (folder.is_known() or not save):
            resume = None  # it was cut before its first checkpoint
        if trainer.is_world_process_zero():
            if not (resume or save):  # what lies there is of another length, perhaps
                shutil.rmtree(folder.path, ignore_errors=True)
            folder.write()
        try:
            output = trainer.train(resume)
        except (ValueError, OSError, ImportError):
            if trainer.state.global_step:
                with not_the_input(f"{plan.name}, at step {trainer.state.global_step},"):
                    raise
            raise
        with not_the_input(f"evaluating and saving {plan.name}"):
            run = finish_run(plan.name, trainer, self.task, output.metrics)
            run.figures |= plan.figures(trainer) if plan.figures else {}
            if save:
                save_model(trainer, self.task)
            if trainer.is_world_process_zero():
                folder.write(run)
        return run


def _check_arguments(args: Any, task: LearningTask) -> None:
    """Refuses arguments that don't go with the task and would end a run at an evaluation."""
    names = [f"eval_{name}" for name in ("loss", *task.metrics)]
    wanted, batch = args.metric_for_best_model, args.per_device_eval_batch_size * args.world_size
    if wanted and wanted not in names and f"eval_{wanted}" not in names:
        raise ValueError(
            f"metric_for_best_model={wanted!r}: an evaluation gives {', '.join(names)}. Name one of these."
        )
    if args.dataloader_drop_last and batch > len(task.validation):
        raise ValueError(
            f"dataloader_drop_last=True leaves none of the {len(task.validation)} validation examples, fewer than a "
            f"batch of {batch}: lower per_device_eval_batch_size."
        )
    if args.neftune_noise_alpha and task.tokenizer is None:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} is noise on token embeddings, which task={task.task!r} "
            f"hasn't: leave it out."
        )


def _with_ids(part: Any) -> Any:
    return part if ID_COLUMN in part.column_names else add_example_ids(part)


def save_model(trainer: Any, task: LearningTask) -> None:
    """Saves a model and what makes its inputs into the output folder, whole or not at all; pushes nothing."""
    folder = Path(str(trainer.args.output_dir))
    try:
        trainer.save_model(_internal_call=True)  # otherwise it would push before the card is there
        trainer.save_state()
        if trainer.is_world_process_zero():
            task.save_processor(folder)
    except BaseException:
        for file in (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")):
            file.unlink(missing_ok=True)
        raise


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


def finish_run(name: str, trainer: Any, task: LearningTask, output: Mapping[str, float]) -> Run:
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
