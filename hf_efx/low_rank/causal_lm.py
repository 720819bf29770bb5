"""Causal language models, dense and low-rank: what is trained, and one run with its figures.

`train_gpt2.py` is the program around it; the quickstart and the studies call the same functions.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_efx.core.data.text_data import TextCollator
from hf_efx.core.model.adapter import efx_record, get_efx_model
from hf_efx.core.model.record import EfxConfig
from hf_efx.core.training.step_cost import StepTimer, optimizer_bytes
from hf_efx.low_rank.arguments import LowRankArguments
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.decay import factorised_layers
from hf_efx.low_rank.report import low_rank_report
from hf_efx.low_rank.trainer import LowRankTrainer
from hf_efx.programs.causal_lm import Corpus, check_fit, loss_sums, padding_id, token_metrics
from hf_efx.programs.model_options import ModelOptions, checkpoint_config, scratch_config


def scratch_model(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase, seed: int, low_rank_config: LowRankConfig | None = None
) -> PreTrainedModel:
    """A new model; equal seeds have equal dense weights, of which the factors are made where a config is given.

    Raises:
        ValueError: For settings that can't be used.
    """
    config = scratch_config(options.model_type, options.config_overrides, tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # Before a Trainer sees it: the Trainer sets the seed again, and 'he' would draw the numbers of the dense weights.
    return _prepared(get_efx_model(model, low_rank_config) if low_rank_config else model)


def checkpoint_model(name: str, low_rank_config: LowRankConfig | None = None) -> PreTrainedModel:
    """Loads a dense checkpoint, factorised by the SVD of its weights where a config is given, or a low-rank one.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If the config can't be carried out on it.
    """
    factorised = getattr(checkpoint_config(name), "efx", None)
    if factorised and low_rank_config is not None and (given := low_rank_config.changed_fields()):
        raise ValueError(
            f"model_name_or_path={name!r} is factorised already, so {', '.join(given)} can't be chosen: leave them "
            f"out, or make it dense with merge_and_unload first."
        )
    config = EfxConfig([low_rank_config]) if low_rank_config and not factorised else None
    model = AutoModelForCausalLM.from_pretrained(name, **({"quantization_config": config} if config else {}))
    if low_rank_config is None and efx_record(model):
        raise ValueError(f"model_name_or_path={name!r} is factorised: method='dense' needs merge_and_unload first.")
    return _prepared(model)


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    # Where a class' name tells it nothing (GPT2LMHeadModel), transformers falls back to this loss with a warning.
    model.loss_type = "ForCausalLM"  # pyright: ignore[reportAttributeAccessIssue]
    return model


def causal_lm_trainer(
    model: PreTrainedModel,
    corpus: Corpus,
    args: LowRankArguments,
    low_rank_config: LowRankConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> LowRankTrainer:
    """A trainer that evaluates perplexity per token and bits per byte, and times its steps.

    Args:
        model: Dense or factorised.
        corpus: The text.
        args: Training arguments; runs with equal `seed` see the batches in the same order.
        low_rank_config: With `args.dense_warmup_steps`: how to factorise then. Otherwise None.
        callbacks: Further callbacks.

    Raises:
        ValueError: If the tokens or the block size don't fit the model, or options contradict.
    """
    check_fit(model, corpus.tokenizer, corpus.train)
    return LowRankTrainer(
        model=model,
        args=args,
        low_rank_config=low_rank_config,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        processing_class=corpus.tokenizer,
        data_collator=TextCollator(padding_id(corpus.tokenizer)),
        compute_metrics=token_metrics(corpus.bytes_per_token),
        preprocess_logits_for_metrics=loss_sums,
        callbacks=[StepTimer(), *callbacks],
    )


def train_causal_lm(trainer: LowRankTrainer, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
    """Trains and evaluates what `causal_lm_trainer` made.

    Args:
        trainer: The trained model is in `trainer.model` afterwards, the log in `trainer.state.log_history`.
        resume_from_checkpoint: As in `LowRankTrainer.train`.

    Returns:
        `eval_loss` (nats per token, mean over batches), `eval_perplexity` (per token), `eval_bits_per_byte`,
        `parameters`, `dense_parameters` (of the same model with dense layers), `optimizer_bytes` (on one process),
        `step_seconds` (median of the training steps), `train_loss`, and the Trainer's other figures.
    """
    output = trainer.train(resume_from_checkpoint)
    model: Any = trainer.model
    figures: dict[str, Any] = {**output.metrics, **trainer.evaluate()}
    figures["parameters"] = figures["dense_parameters"] = model.num_parameters()
    if factorised_layers(model):
        figures["dense_parameters"] = low_rank_report(model).total_dense_parameters
    figures["optimizer_bytes"] = optimizer_bytes(trainer.optimizer)  # pyright: ignore[reportArgumentType]
    timer = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StepTimer))
    figures["step_seconds"] = statistics.median(timer.seconds) if timer.seconds else None
    return figures
