"""Causal language models: which text they are trained on, and how they are evaluated."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from hf_efx.core.data.text_data import byte_tokenizer, content_fingerprint, load_text, tokenize_blocks, train_tokenizer
from hf_efx.core.scoring.losses import per_example_loss


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
    tokenizer = load_tokenizer(options, texts, checkpoint)
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


def load_tokenizer(
    options: DataOptions, texts: Dataset | DatasetDict, checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads or trains the tokenizer that the options ask for: without a word from them the checkpoint's, or the bytes.

    Raises:
        ValueError: If it can't be loaded.
    """
    if options.vocab_size:
        return train_tokenizer(texts, options.vocab_size)
    name = options.tokenizer or checkpoint
    if name is None:
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer={name!r} can't be loaded: {error}. Name another (--tokenizer).") from error


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset) -> None:
    """Raises ValueError if a vocabulary or the examples' length, told by the first few, is too large for a model."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary, block = embeddings.weight.shape[0], max(map(len, train[:8]["input_ids"]))
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}: name the "
            f"tokenizer that belongs to the model."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and block > limit:
        raise ValueError(
            f"block_size={block} is above the model's {limit} positions: lower it, or, from scratch, raise "
            f"n_positions (max_position_embeddings) in config_overrides."
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short examples of a causal model: the padding token, else the end-of-text token."""
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
