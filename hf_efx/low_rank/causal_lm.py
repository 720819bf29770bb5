"""Causal language models, dense and low-rank: what is trained, on which text, and one run with its figures.

`train_gpt2.py` is the program around it; the quickstart and the studies call the same functions.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_efx.core.adapter import efx_record, get_efx_model
from hf_efx.core.efx_config import EfxConfig
from hf_efx.core.losses import per_example_loss
from hf_efx.core.text_data import (
    TextCollator,
    byte_tokenizer,
    content_fingerprint,
    load_text,
    tokenize_blocks,
    train_tokenizer,
)
from hf_efx.low_rank.arguments import LowRankArguments
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.decay import factorised_layers
from hf_efx.low_rank.report import low_rank_report
from hf_efx.low_rank.trainer import LowRankTrainer


@dataclass
class ModelOptions:
    """Which model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint to start from, dense or of hf_efx: a folder or a name on the Hub. Without it the "
            "model is trained from scratch.",
            "aliases": ["--model"],
        },
    )
    model_type: str = field(
        default="gpt2", metadata={"help": "Architecture of a model from scratch, by its transformers name."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Settings of a model from scratch in place of the defaults: 'n_layer=2,n_embd=128'."},
    )


@dataclass
class DataOptions:
    """Which text, and how it becomes examples."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A file (.txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .gz of these), a folder of such files, "
            "or a data set on the Hub (name or name:config). Without it: the English text of Python's own library."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Where a table holds the text."})
    mode: Literal["pack", "line"] = field(
        default="pack",
        metadata={
            "help": "'pack' joins the documents and cuts them into full blocks, nothing is padded; 'line' keeps each "
            "document apart, at the cost of padding."
        },
    )
    block_size: int = field(
        default=256,
        metadata={"help": "Tokens of an example. Longer ones see more context, and cost more time and memory each."},
    )
    max_eval_blocks: int | None = field(
        default=None, metadata={"help": "Examples to evaluate on at most: fewer are faster, and tell less."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of a tokenizer. Without it: the checkpoint's own; from scratch, the 256 bytes."
        },
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE tokenizer of so many tokens on the text, instead."}
    )

    def __post_init__(self) -> None:
        if self.tokenizer and self.vocab_size:
            raise ValueError(
                f"tokenizer={self.tokenizer!r} and vocab_size={self.vocab_size} exclude each other: one loads "
                f"a tokenizer, the other trains one."
            )
        if self.max_eval_blocks is not None and self.max_eval_blocks < 1:
            raise ValueError(f"max_eval_blocks={self.max_eval_blocks}: expected 1 or more.")


@dataclass(frozen=True)
class Corpus:
    """Text as examples for a causal model.

    Attributes:
        name: What it is called in results and cards.
        tokenizer: Made the tokens.
        train: Examples with `input_ids`.
        validation: The same, held out.
        bytes_per_token: UTF-8 bytes of the validation text for each of its tokens, end-of-text tokens counted.
        fingerprint: Content hash of the validation text.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset
    bytes_per_token: float
    fingerprint: str


def load_corpus(options: DataOptions, checkpoint: str | None = None) -> Corpus:
    """Loads the text, loads or trains the tokenizer, and cuts the examples.

    Args:
        options: The text and what to do with it.
        checkpoint: Folder or Hub name of the model whose tokenizer is used where the options name none.

    Raises:
        FileNotFoundError: If the text isn't there.
        ValueError: If it can't be used, or the tokenizer can't be loaded.
    """
    texts = load_text(options.dataset, options.text_column)
    if options.vocab_size:
        tokenizer = train_tokenizer(texts, options.vocab_size)
    elif name := options.tokenizer or checkpoint:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer={name!r} can't be loaded: {error}. Name another (--tokenizer).") from error
    else:
        tokenizer = byte_tokenizer()
    documents = [str(text) for text in texts["validation"]["text"]]
    tokens = sum(len(ids) + 1 for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"])
    validation = tokenize_blocks(texts["validation"], tokenizer, options.block_size, options.mode)
    if options.max_eval_blocks:
        validation = validation.select(range(min(options.max_eval_blocks, len(validation))))
    name = options.dataset or "Python standard library text"
    return Corpus(
        name=Path(name).name if Path(name).exists() else name,
        tokenizer=tokenizer,
        train=tokenize_blocks(texts["train"], tokenizer, options.block_size, options.mode),
        validation=validation,
        bytes_per_token=sum(len(text.encode("utf-8", "surrogatepass")) for text in documents) / tokens,
        fingerprint=content_fingerprint(texts["validation"]),
    )


def scratch_config(
    model_type: str, overrides: str | Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """The config of a new model.

    Args:
        model_type: transformers' name of the architecture.
        overrides: Settings in place of the defaults, as a mapping or as in `"n_layer=2,n_embd=128"`.
        tokenizer: Gives the vocabulary's size and the special tokens; None leaves the architecture's own.

    Raises:
        ValueError: For an unknown architecture or setting, or a malformed text.
    """
    settings = dict(_parse_overrides(overrides) if isinstance(overrides, str) else overrides or {})
    known = AutoConfig.for_model(model_type)
    for name, value in settings.items():
        if not hasattr(known, name):
            raise ValueError(
                f"config_overrides: {name!r} is no setting of {type(known).__name__}; it has, among others: "
                f"{', '.join(sorted(set(known.to_dict()) - set(PreTrainedConfig().to_dict())))}."
            )
        if isinstance(getattr(known, name), float) and isinstance(value, str):
            settings[name] = float(value)  # YAML takes 1e-5 for a text
    vocabulary: dict[str, Any] = {}
    if tokenizer is not None:
        vocabulary = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        vocabulary["vocab_size"] = len(tokenizer)
    return AutoConfig.for_model(model_type, **{**vocabulary, **settings})


def _parse_overrides(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    wrong = next((part for part in pairs if not part[1]), None)
    if wrong:
        raise ValueError(f"config_overrides={text!r}: {wrong[0]!r} has no value; expected 'n_layer=2,n_embd=128'.")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


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


def checkpoint_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint.

    Raises:
        OSError: If there is no such checkpoint.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # transformers would ask the Hub, and say so
        raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder.")
    return AutoConfig.from_pretrained(name)


def checkpoint_model(name: str, low_rank_config: LowRankConfig | None = None) -> PreTrainedModel:
    """Loads a dense checkpoint, factorised by the SVD of its weights where a config is given, or a low-rank one.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If the config can't be carried out on it.
    """
    factorised = getattr(checkpoint_config(name), "efx", None)
    if factorised and low_rank_config is not None and (given := low_rank_config.method_fields()):
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
    _check_fit(model, corpus)
    return LowRankTrainer(
        model=model,
        args=args,
        low_rank_config=low_rank_config,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        processing_class=corpus.tokenizer,
        data_collator=TextCollator(_padding(corpus.tokenizer)),
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


def _check_fit(model: PreTrainedModel, corpus: Corpus) -> None:
    embeddings: Any = model.get_input_embeddings()
    vocabulary, block = embeddings.weight.shape[0], max(map(len, corpus.train[:8]["input_ids"]))
    if len(corpus.tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(corpus.tokenizer)} tokens, the model's vocabulary {vocabulary}: name the "
            f"tokenizer that belongs to the model."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and block > limit:
        raise ValueError(
            f"block_size={block} is above the model's {limit} positions: lower it, or, from scratch, raise "
            f"n_positions (max_position_embeddings) in config_overrides."
        )


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # pyright: ignore


def loss_sums(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the token losses and number of tokens of each example, [batch, 2]: all that evaluation keeps."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    loss, count = per_example_loss(logits, labels, "causal")
    return torch.stack([loss * count, count.to(loss.dtype)], -1)


def token_metrics(bytes_per_token: float) -> Any:
    """The `compute_metrics` that goes with `loss_sums`: perplexity per token and bits per byte, each token alike."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        total, tokens = np.asarray(prediction.predictions, np.float64).sum(0).tolist()
        nats = total / tokens
        perplexity = math.exp(nats) if nats < 700 else math.inf
        return {"perplexity": perplexity, "bits_per_byte": nats / math.log(2) / bytes_per_token}

    return compute


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimiser's state, on this process."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StepTimer(TrainerCallback):
    """Times each optimiser step, without loading data, logging, evaluating and saving.

    Attributes:
        seconds: Of each step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._start)
