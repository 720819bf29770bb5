"""The program scripts/train_marian.py: trains a Marian model on pairs, vocabulary included, and tells its BLEU.

    python scripts/train_marian.py                                  # number words, German to English
    python scripts/train_marian.py --dataset strings.tsv.gz --source_column de --target_column en --max_steps 3000
    accelerate launch scripts/train_marian.py --config run.yaml

The folder that it leaves loads with MarianTokenizer and MarianMTModel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_efx.core.training.arguments import EfxArgumentsMixin
from hf_efx.core.training.trainer import EfxTrainerMixin
from hf_efx.programs.frame import run_program
from hf_efx.programs.task_report import Report, plot_losses, report_runs
from hf_efx.programs.task_run import PlannedRun, TaskJob, task_trainer
from hf_efx.programs.translation import MarianOptions, PairOptions, load_translation

PLOT = "loss.png"


@dataclass
class MarianArguments(EfxArgumentsMixin, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with our options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.predict_with_generate:
            raise ValueError("predict_with_generate=False leaves an evaluation without its BLEU: leave it out.")
        for name, least in (("generation_num_beams", 1), ("generation_max_length", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more.")


class MarianTrainer(EfxTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with everything of `EfxTrainerMixin`."""

    extra_columns = ("length",)  # by which batches are grouped


@dataclass
class ProgramOptions:
    """What the program does beside training."""

    plot: bool = field(default=True, metadata={"help": f"Draw the losses into {PLOT}; needs matplotlib."})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, as `run_program` says."""
    return run_program(
        _program,
        argv,
        prog="train_marian.py",
        description=__doc__,
        options=(MarianOptions, PairOptions, ProgramOptions, MarianArguments),
        output_dir="runs/marian",
        num_train_epochs=4,  # number words need no more
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        warmup_steps=0.1,  # of the run
        train_sampling_strategy="group_by_length",
        predict_with_generate=True,
        generation_num_beams=4,
        logging_steps=50,
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
    )


def _program(
    command: str, model_options: MarianOptions, pairs: PairOptions, program: ProgramOptions, args: MarianArguments
) -> None:
    with args.main_process_first(desc="loading the pairs"):
        task = load_translation(pairs, model_options, str(args.output_dir))
    limit = args.generation_max_length or task.max_length
    sizes = {"training pairs": len(task.train), "validation pairs": len(task.validation)}
    sizes |= {"vocabulary": len(task.tokenizer or ()), "max_length": task.max_length}
    job = TaskJob("mc_dropout", command, args, task, model_options, {"task": task.task, **sizes}, program.plot)

    def trainer(args: Any) -> MarianTrainer:
        model: Any = job.model()
        if limit > (positions := model.config.max_position_embeddings):
            raise ValueError(f"generation_max_length={limit} is above the model's {positions} positions: lower it.")
        model.generation_config.num_beams = args.generation_num_beams or model.generation_config.num_beams
        model.generation_config.max_length = limit
        collator = DataCollatorForSeq2Seq(task.tokenizer, model)  # pyright: ignore[reportArgumentType]
        return task_trainer(task, MarianTrainer, model, args, data_collator=collator)

    made, runs = job.train(PlannedRun("marian", args, trainer))
    report = Report(
        title=f"Marian on {task.name}",
        settings={"label_smoothing_factor": args.label_smoothing_factor, "warmup_steps": args.warmup_steps},
        plot=PLOT,
        draw=lambda runs, metric, path: plot_losses({runs[0].name: made.state.log_history}, path),
    )
    report_runs(job, made, runs, report)
