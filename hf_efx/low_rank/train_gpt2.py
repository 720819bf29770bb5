"""The program `hf-efx low-rank`: trains any causal language model, dense or low-rank, on any text.

    hf-efx low-rank --config_overrides n_layer=2,n_embd=128,n_head=4 --rank 0.25 --max_steps 500 --learning_rate 1e-3
    hf-efx low-rank --config run.yaml --learning_rate 5e-4
    hf-efx low-rank --model_name_or_path gpt2 --dataset my_text.jsonl --block_size 512 --rank 0.5
    hf-efx low-rank --method dense --output_dir runs/dense --config run.yaml
    accelerate launch scripts/train_low_rank_gpt2.py --config run.yaml

"Exploring Low Rank Training of Deep Neural Networks", Kamalakara et al. 2022, arXiv 2209.13569.
"""

import dataclasses
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import EvalResult
from transformers import PreTrainedModel

from hf_efx.core.model.adapter import efx_record
from hf_efx.core.model.record import entry_config
from hf_efx.core.results.card import write_model_card
from hf_efx.core.results.evidence import public_command, write_results
from hf_efx.core.results.plots import matplotlib_pyplot
from hf_efx.low_rank.arguments import LowRankArguments, LowRankArgumentsMixin
from hf_efx.low_rank.causal_lm import causal_lm_trainer, checkpoint_model, scratch_model, train_causal_lm
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.trainer import LowRankTrainer
from hf_efx.programs.causal_lm import Corpus, DataOptions, load_corpus
from hf_efx.programs.command_line import OptionParser, config_option_fields, resume_point
from hf_efx.programs.model_options import ModelOptions, checkpoint_config
from hf_efx.registry import METHODS

PLOT, RESULTS = "loss.png", "results.json"
_TRAINING = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "per_device_train_batch_size", "seed")


@dataclass
class ProgramOptions:
    """What the program does beside training."""

    method: Literal["low_rank", "dense"] = field(
        default="low_rank",
        metadata={"help": "'dense' trains the dense twin: the same weights to start from, the same batches."},
    )
    plot: bool = field(default=True, metadata={"help": f"Draw the losses into {PLOT}; needs matplotlib."})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = (ModelOptions, DataOptions, ProgramOptions, LowRankArguments)
    parser = OptionParser(options, LowRankConfig, "hf-efx low-rank", (__doc__ or "").splitlines()[0])
    on_gpu = torch.accelerator.is_available()
    parser.set_defaults(output_dir="runs/low_rank", logging_steps=20, dataloader_pin_memory=on_gpu)
    parser.set_defaults(ddp_find_unused_parameters=False)  # a language model uses all of them at each step
    model_options, data_options, program, args, config = parser.read(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_efx").setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    trainer = None
    try:
        if program.plot:
            matplotlib_pyplot()
        if model_options.model_name_or_path:  # a wrong name shows before the text is read
            checkpoint_config(model_options.model_name_or_path)
        with args.main_process_first(desc="loading the text"):
            corpus = load_corpus(data_options, model_options.model_name_or_path)
        config = config if program.method == "low_rank" else None
        model = _model(model_options, corpus, args, config)
        keep_card, args.model_card = args.model_card, False  # the card below says more than one written on a push
        trainer = causal_lm_trainer(model, corpus, args, config if args.dense_warmup_steps else None)
        figures = train_causal_lm(trainer, resume_point(args.resume_from_checkpoint))
    except (ValueError, OSError, ImportError) as error:
        if trainer is not None and trainer.state.global_step:  # not the input's fault
            raise
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    trainer.save_model(_internal_call=True)  # otherwise it would push before the card is there
    if trainer.is_world_process_zero():
        _write(trainer, corpus, data_options, program, figures, argv, keep_card)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # the first process wrote meanwhile; groups end together
    trainer.end()
    return 0


def _model(
    options: ModelOptions, corpus: Corpus, args: LowRankArguments, config: LowRankConfig | None
) -> PreTrainedModel:
    at_start = None if args.dense_warmup_steps else config
    if options.model_name_or_path:
        return checkpoint_model(options.model_name_or_path, at_start)
    return scratch_model(options, corpus.tokenizer, args.seed, at_start)


def _write(
    trainer: LowRankTrainer,
    corpus: Corpus,
    data: DataOptions,
    program: ProgramOptions,
    figures: dict[str, Any],
    argv: Sequence[str],
    card: bool,
) -> None:
    """Plot, results and card beside the checkpoint, and a few lines to the terminal."""
    args: Any = trainer.args
    folder = Path(args.output_dir)
    if program.plot:
        plot_losses({program.method: trainer.state.log_history}, folder / PLOT)
    training = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in _TRAINING}
    training |= {f.name: getattr(args, f.name) for f in dataclasses.fields(LowRankArgumentsMixin)}
    training |= {"steps": trainer.state.global_step, "processes": args.world_size, "block_size": data.block_size}
    write_results(
        folder / RESULTS,
        title=f"{program.method} on {corpus.name}",
        command=public_command(["-m", "hf_efx.cli", "low-rank", *argv]),
        data={"name": corpus.name, "fingerprint": corpus.fingerprint, "bytes_per_token": corpus.bytes_per_token},
        seeds=[args.seed],
        rows=[{"configuration": program.method, "seed": args.seed, **figures}],
        claims=[],
        settings=training,
        plot=PLOT if program.plot else None,
    )
    if card:
        model: Any = trainer.model
        parts: dict[str, Any] = {"plot": PLOT if program.plot else None}
        if args.push_to_hub:
            parts |= {"repo_id": trainer.hub_model_id, "model_name": str(trainer.hub_model_id).rpartition("/")[2]}
        write_causal_lm_card(folder, model, corpus, figures, training, **parts)
    print(
        f"validation: perplexity {figures['eval_perplexity']:.4g} per token, {figures['eval_bits_per_byte']:.4g} bits "
        f"per byte\nparameters: {figures['parameters']:,} (dense: {figures['dense_parameters']:,})\n"
        f"checkpoint: {folder}"
    )


def write_causal_lm_card(
    folder: Path,
    model: PreTrainedModel,
    corpus: Corpus,
    figures: Mapping[str, Any],
    training: Mapping[str, Any],
    note: str = "",
    **parts: Any,
) -> Path:
    """Writes the card of a trained model, with perplexity and bits per byte in `model-index`.

    Args:
        folder: Of the checkpoint; its name is the model's, unless `model_name` says otherwise.
        model: The model.
        corpus: What it was trained and evaluated on.
        figures: As `train_causal_lm` returns them.
        training: Settings to show.
        note: Further sentences of the description.
        **parts: Further parts of the card, as `write_model_card` takes them.

    Returns:
        The card's path.
    """
    entries = (efx_record(model) or {"methods": []})["methods"]
    methods = [entry["method"] for entry in entries]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", corpus.name),
            dataset_name=corpus.name,
            dataset_split="validation",
            metric_type=metric.replace(" ", "_"),
            metric_name=f"{metric} (per token)" if metric == "perplexity" else metric,
            metric_value=figures[f"eval_{metric.replace(' ', '_')}"],
        )
        for metric in ("perplexity", "bits per byte")
    ]
    kind = ", ".join(METHODS[name].title.lower() for name in methods) or "dense training"
    description = (
        f"A {model.config.model_type} language model of {figures['parameters']:,} parameters "
        f"({figures['dense_parameters']:,} with dense layers), by {kind}. {note}".rstrip()
    )
    return write_model_card(
        folder,
        methods=methods,
        results=results,
        needs_hf_efx=bool(methods),
        configuration={entry["method"]: _own_fields(entry_config(entry)) for entry in entries},
        training=training,
        citations=[METHODS[name].citation for name in methods],
        pipeline_tag="text-generation",
        **{
            "model_name": folder.resolve().name,
            "repo_id": None if folder.is_absolute() else folder.as_posix(),
            "description": description,
            **parts,
        },
    )


def _own_fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in config_option_fields(type(config))}


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
    figure.savefig(path, dpi=120)
    plt.close(figure)
