"""Translation as a task of programs: which pairs, which Marian model, and how it is evaluated."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedModel,
)

from hf_efx.core.data.example_ids import add_example_ids
from hf_efx.core.data.marian_tokenizer import train_marian_tokenizer
from hf_efx.core.data.text_data import content_fingerprint, source_name
from hf_efx.core.data.text_files import column_texts
from hf_efx.core.data.text_pairs import NUMBER_WORDS, load_pairs
from hf_efx.programs.model_options import ModelOptions, checkpoint_config, parse_overrides, scratch_config
from hf_efx.programs.tasks import LearningTask

logger = logging.getLogger(__name__)

VOCABULARY = "_vocabulary"  # in the output folder; the Trainer pushes nothing that begins with an underscore
# New models: 7.6 M parameters with 8,000 tokens for files, .6 M with 500 for number words.
_SIZES = {
    "files": {"d_model": 256, "layers": 3, "ffn_dim": 1024},
    NUMBER_WORDS: {"d_model": 128, "layers": 2, "ffn_dim": 128},
}
_VOCAB_SIZES = {"files": 8000, NUMBER_WORDS: 500}
_POSITIONS = 512  # as Helsinki-NLP's models have them; they are sines and cost nothing


@dataclass
class MarianOptions(ModelOptions):
    """Which Marian model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A Marian checkpoint to train on from, with its own tokenizer: a folder or a name on the Hub. "
            "Without it a vocabulary is trained on the pairs, and a model from scratch.",
            "aliases": ["--model"],
        },
    )
    model_type: str = field(default="marian", init=False)
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Settings of a model from scratch in place of the defaults: 'd_model=512,encoder_layers=6'. "
            "Defaults: d_model=256, 3 + 3 layers, FFN 1024, 4 heads, dropout=0.1 (7.6 million parameters); of number "
            "words 128, 2 + 2 and 128."
        },
    )


@dataclass
class PairOptions:
    """Which pairs of texts, and how they become examples."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A table of pairs (.tsv, .csv, .json, .jsonl, .parquet, .gz of these), a folder of such files, or "
            "a data set on the Hub (name or name:config). Without it: number words, German to English.",
            "aliases": ["--data"],
        },
    )
    source_column: str | None = field(
        default=None,
        metadata={
            "help": "Where the table holds what is translated; 'translation.de' reaches into a nested column. Without "
            "it 'source', of number words 'de'."
        },
    )
    target_column: str | None = field(
        default=None, metadata={"help": "Where it holds the translations. Without it 'target', of number words 'en'."}
    )
    max_length: int = field(
        default=128,
        metadata={
            "help": "Tokens of a source and of a translation at most: longer pairs are left out, and translations end "
            "here. More covers longer texts, and costs memory."
        },
    )
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Pairs to train on at most: fewer are faster to load, and teach less."}
    )
    max_eval_examples: int | None = field(
        default=None, metadata={"help": "Pairs to evaluate on at most: fewer are faster, and tell less."}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the vocabulary that is trained on sources and translations together. Without it 8,000, "
            "of number words 500."
        },
    )

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_train_examples", 1), ("max_eval_examples", 1), ("vocab_size", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more.")


@dataclass(frozen=True)
class TranslationTask(LearningTask):
    """Pairs of one translation task, and everything that a Trainer needs beside the model and its arguments.

    Attributes:
        size: A key of the sizes of new models.
        max_length: Tokens of a source and of a translation at most.
    """

    size: str = "files"
    max_length: int = 128

    @property
    def metrics(self) -> tuple[str, ...]:
        """Corpus BLEU and chrF, from 0 to 100."""
        return ("bleu", "chrf")

    @property
    def higher_is_better(self) -> bool:
        """Of BLEU more is better."""
        return True

    @property
    def auto_class(self) -> str:
        """Name of the transformers class that loads the model."""
        return MarianMTModel.__name__

    @property
    def trainer_parts(self) -> dict[str, Any]:
        """Keyword arguments of a Trainer; its collator makes no decoder inputs, which label smoothing asks for."""
        collator = DataCollatorForSeq2Seq(self.tokenizer)  # pyright: ignore[reportArgumentType]
        return {**super().trainer_parts, "data_collator": collator}

    def model_init(
        self, seed: int, options: ModelOptions | None = None, size: str = "small", trained: bool = False
    ) -> PreTrainedModel:
        """A Marian model; equal seeds give equal new weights.

        Args:
            seed: Of new weights.
            options: Which model; None for a new one.
            size: Without meaning here.
            trained: Without meaning here: a checkpoint is taken whole.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If the options can't be used, or the model has too few positions.
        """
        options = options or MarianOptions()
        torch.manual_seed(seed)
        if options.model_name_or_path:
            model: Any = MarianMTModel.from_pretrained(options.model_name_or_path)
        else:
            model = MarianMTModel(self._config(options))
            model.generation_config.suppress_tokens = [model.config.pad_token_id]  # no label is ever one
        if self.max_length > model.config.max_position_embeddings:
            raise ValueError(
                f"max_length={self.max_length} is above the model's {model.config.max_position_embeddings} positions: "
                f"lower it, or, from scratch, raise max_position_embeddings in config_overrides."
            )
        # Its loss is the batch's mean, whatever num_items_in_batch says: with that the Trainer would neither divide by
        # gradient_accumulation_steps nor spare it the factor of the processes.
        model.accepts_loss_kwargs = False
        model.generation_config.max_length = self.max_length
        return model

    def _config(self, options: ModelOptions) -> Any:
        size, tokenizer = _SIZES[self.size], self.tokenizer
        assert tokenizer is not None
        overrides = parse_overrides(options.config_overrides or "")
        width = overrides.get("d_model", size["d_model"])
        settings: dict[str, Any] = {"max_position_embeddings": _POSITIONS, "scale_embedding": True}
        for part in ("encoder", "decoder"):
            settings |= {f"{part}_layers": size["layers"], f"{part}_ffn_dim": size["ffn_dim"]}
            settings[f"{part}_attention_heads"] = 4
        settings |= {
            "d_model": width,
            # Scaled by sqrt(d_model) words are then as large as positions, and logits begin near 1.
            "init_std": float(width) ** -0.5,
            "decoder_start_token_id": tokenizer.pad_token_id,  # as all Marian models
            "forced_eos_token_id": tokenizer.eos_token_id,
        }
        return scratch_config("marian", {**settings, **overrides}, tokenizer)


def load_translation(options: PairOptions, model_options: MarianOptions, output_dir: str) -> TranslationTask:
    """Loads the pairs and loads or trains the tokenizer.

    Args:
        options: The pairs.
        model_options: Which model; a checkpoint brings its tokenizer.
        output_dir: Where a trained vocabulary is kept, for a run that is resumed.

    Raises:
        FileNotFoundError: If the pairs aren't there.
        ImportError: If an extra is missing; it is named.
        ValueError: If the pairs can't be used, or there is no such tokenizer.
    """
    _check_extra()
    pairs = load_pairs(options.dataset, options.source_column, options.target_column)
    pairs = DatasetDict({name: part.select_columns(["source", "target"]) for name, part in pairs.items()})
    limits = {"train": options.max_train_examples, "validation": options.max_eval_examples}
    for name, limit in limits.items():
        pairs[name] = pairs[name].select(range(min(limit or len(pairs[name]), len(pairs[name]))))
    size = "files" if options.dataset else NUMBER_WORDS
    tokenizer = _tokenizer(pairs["train"], options, model_options, size, Path(output_dir) / VOCABULARY)
    return TranslationTask(
        task="translation",
        name=source_name(options.dataset) if options.dataset else NUMBER_WORDS,
        train=_examples(pairs["train"], tokenizer, options.max_length),
        holdout=None,
        validation=_examples(pairs["validation"], tokenizer, options.max_length),
        fingerprint_columns=("source", "target"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=translation_metrics(tokenizer),
        preprocess_logits_for_metrics=lambda generated, labels: generated,
        tokenizer=tokenizer,
        size=size,
        max_length=options.max_length,
    )


def _check_extra() -> None:
    try:
        import sacrebleu  # noqa: F401
        import sacremoses  # noqa: F401
        import sentencepiece  # noqa: F401
    except ImportError as error:
        raise ImportError(f"translation needs {error.name}: pip install 'hf_efx[mt]'") from None


def _tokenizer(
    train: Dataset, options: PairOptions, model_options: MarianOptions, size: str, folder: Path
) -> MarianTokenizer:
    if name := model_options.model_name_or_path:
        if options.vocab_size or model_options.config_overrides:
            given = "vocab_size" if options.vocab_size else "config_overrides"
            raise ValueError(
                f"{given} is for a model from scratch, but model_name_or_path={name!r} names a checkpoint."
            )
        if (kind := checkpoint_config(name).model_type) != "marian":
            raise ValueError(f"model_name_or_path={name!r} is of type {kind!r}: name a Marian checkpoint.")
        return MarianTokenizer.from_pretrained(name)
    vocab_size = options.vocab_size or _VOCAB_SIZES[size]
    folder = folder / f"{content_fingerprint(train)[:16]}-{vocab_size}"
    if folder.is_dir():  # of this run, before it was cut, or of its first process
        return MarianTokenizer.from_pretrained(folder)
    logger.info("training a vocabulary of %d tokens on %d pairs", vocab_size, len(train))
    texts = (text for column in ("source", "target") for text in column_texts(train, column))
    return train_marian_tokenizer(folder, texts, vocab_size, _POSITIONS)


def _examples(pairs: Dataset, tokenizer: MarianTokenizer, max_length: int) -> Dataset:
    """Adds `input_ids`, `labels`, `length` (of the longer of both) and ids; pairs that are too long are left out."""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        inputs = tokenizer(rows["source"], verbose=False)["input_ids"]
        labels = tokenizer(text_target=rows["target"], verbose=False)["input_ids"]
        lengths = [max(map(len, pair)) for pair in zip(inputs, labels, strict=True)]
        return {"input_ids": inputs, "labels": labels, "length": lengths}

    # A cache key of our own: a tokenizer's hash has its files' place in it.
    state = [Path(file).read_bytes() for file in tokenizer.spm_files] + [json.dumps(tokenizer.get_vocab()).encode()]
    key = hashlib.sha256(b"".join([pairs._fingerprint.encode(), *state])).hexdigest()[:16]
    examples = pairs.map(encode, batched=True, new_fingerprint=key, desc="Tokenizing pairs")
    fits = np.asarray(examples["length"][:]) <= max_length
    if not fits.any():
        raise ValueError(f"max_length={max_length} leaves none of {len(fits)} pairs: raise it.")
    if not fits.all():
        logger.info("%d of %d pairs have more than %d tokens and are left out", (~fits).sum(), len(fits), max_length)
        examples = examples.select(np.flatnonzero(fits))
    return add_example_ids(examples)


def translation_metrics(tokenizer: MarianTokenizer) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` of generated translations: corpus BLEU and chrF of sacrebleu, from 0 to 100."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        import sacrebleu

        pad: Any = tokenizer.pad_token_id
        pair: Any = (prediction.predictions, prediction.label_ids)
        generated, labels = (np.where(ids < 0, pad, ids) for ids in pair)
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        references = [tokenizer.batch_decode(labels, skip_special_tokens=True)]
        return {
            "bleu": sacrebleu.corpus_bleu(texts, references).score,
            "chrf": sacrebleu.corpus_chrf(texts, references).score,
        }

    return compute
