"""Loads the data of a `LearningTask`: ids first, then label noise, then the split, then tokens."""

import dataclasses
import hashlib
import json
import logging
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from tokenizers.processors import TemplateProcessing
from transformers import EvalPrediction, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin

from hf_efx.core.data.example_ids import ID_COLUMN, add_example_ids
from hf_efx.core.data.image_data import ImageCollator, channel_statistics, load_images
from hf_efx.core.data.library_text import hash_place, labelled_library_text
from hf_efx.core.data.text_data import TextCollator, load_text, source_name
from hf_efx.programs.causal_lm import Corpus, load_corpus, load_tokenizer, loss_sums, padding_id, token_metrics
from hf_efx.programs.model_options import checkpoint_config
from hf_efx.programs.tasks import CORRUPTED_COLUMN, LearningTask, TaskOptions

logger = logging.getLogger(__name__)

HOLDOUT_SHARE = 0.5  # as the paper's code splits CIFAR (github.com/OATML/RHO-Loss)
LIBRARY_PARTS = 10  # classes of the standard library's text
LIBRARY_VALIDATION_SHARE = 0.1  # 3%, the share for language models, would be 250 paragraphs: two points of noise
VOCABULARY = 4096  # of a tokenizer for classification that is trained on the text: short texts in few tokens


def load_task(options: TaskOptions, checkpoint: str | None = None) -> LearningTask:
    """Loads a task's data.

    Args:
        options: The task, its data and its split; `holdout_share=None` is half here.
        checkpoint: Folder or Hub name of the model that decides the tokenizer (where the options name none) or the
            images' size and normalisation.

    Raises:
        FileNotFoundError: If the data isn't there.
        ImportError: If an extra is missing; it is named.
        ValueError: If the data can't be used.
    """
    kinds = {
        "causal_lm": _causal_lm,
        "text_classification": _text_classification,
        "image_classification": _image_classification,
    }
    if options.task not in kinds:
        raise ValueError(f"task={options.task!r}: expected one of {', '.join(kinds)}.")
    return kinds[options.task](options, checkpoint)


def _causal_lm(options: TaskOptions, checkpoint: str | None) -> LearningTask:
    whole = causal_task(load_corpus(dataclasses.replace(options, max_eval_blocks=None), checkpoint))
    train = _sample(whole.train, options.max_train_examples)
    if options.label_noise:
        noisy = _uniform(np.asarray(train[ID_COLUMN]), options.label_noise_seed, "which") < options.label_noise
        vocabulary = len(whole.tokenizer)  # pyright: ignore[reportArgumentType]
        train = _redraw_tokens(train.add_column(CORRUPTED_COLUMN, noisy), vocabulary, options)  # type: ignore[call-arg]
    train, holdout = _split(train, options.holdout_share)
    validation = _sample(whole.validation, options.max_eval_blocks)
    return dataclasses.replace(whole, train=train, holdout=holdout, validation=validation)


def causal_task(corpus: Corpus) -> LearningTask:
    """The task of learning a corpus, of which nothing is held out."""
    return LearningTask(
        task="causal_lm",
        name=corpus.name,
        # In line mode a row is a document: the ids are those that the documents would have got.
        train=add_example_ids(corpus.train),
        holdout=None,
        validation=corpus.validation,
        fingerprint_columns=("input_ids",),
        data_collator=TextCollator(padding_id(corpus.tokenizer)),
        compute_metrics=token_metrics(corpus.bytes_per_token),
        preprocess_logits_for_metrics=loss_sums,
        tokenizer=corpus.tokenizer,
    )


def _redraw_tokens(train: Dataset, vocabulary: int, options: TaskOptions) -> Dataset:
    """Replaces all tokens of the corrupted examples; their lengths stay."""

    def redraw(rows: dict[str, Any]) -> dict[str, Any]:
        ids = []
        for number, tokens, noisy in zip(rows[ID_COLUMN], rows["input_ids"], rows[CORRUPTED_COLUMN], strict=True):
            generator = np.random.default_rng([options.label_noise_seed, number])
            ids.append(generator.integers(vocabulary, size=len(tokens)).tolist() if noisy else tokens)
        return {"input_ids": ids}

    return train.map(redraw, batched=True, features=train.features, desc="Redrawing tokens")


def _text_classification(options: TaskOptions, checkpoint: str | None) -> LearningTask:
    parts, labels = _labelled_text(options)
    parts["train"] = _redraw_labels(parts["train"], len(labels), options)
    if not (options.vocab_size or options.tokenizer or checkpoint):
        options = dataclasses.replace(options, vocab_size=VOCABULARY)
    tokenizer = load_tokenizer(options, parts["train"], checkpoint)
    if options.vocab_size and isinstance(tokenizer, PreTrainedTokenizerFast):
        end = str(tokenizer.eos_token)  # a first token for models that classify by it
        pair = [(end, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end} $A {end}", special_tokens=pair)  # type: ignore
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    parts = {name: _tokenized(part, tokenizer, options.block_size) for name, part in parts.items()}
    train, holdout = _split(parts["train"], options.holdout_share)
    return LearningTask(
        task=options.task,
        name=source_name(options.dataset),
        train=train,
        holdout=holdout,
        validation=parts["validation"],
        fingerprint_columns=("text", "label"),
        data_collator=LabelledTextCollator(padding_id(tokenizer)),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=most_likely,
        tokenizer=tokenizer,
        labels=tuple(labels),
    )


def _labelled_text(options: TaskOptions) -> tuple[dict[str, Dataset], list[str]]:
    """`train` and `validation` with `text` and `label`, and the classes' names."""
    if options.dataset is None:
        rows = labelled_library_text(LIBRARY_PARTS)
        held_out = [hash_place(text) < LIBRARY_VALIDATION_SHARE for _, text in rows]
        parts = {}
        for name, wanted in (("train", False), ("validation", True)):
            chosen = [row for row, out in zip(rows, held_out, strict=True) if out is wanted]
            parts[name] = Dataset.from_dict({"text": [t for _, t in chosen], "label": [part for part, _ in chosen]})
        column = "label"
    else:
        parts, column = dict(load_text(options.dataset, options.text_column)), options.label_column
    if column not in parts["train"].column_names:
        there = ", ".join(parts["train"].column_names)
        raise ValueError(f"dataset={options.dataset!r} has no label_column={column!r}; it has {there}.")
    labels: dict[str, list[Any]] = {split: parts[split][column][:] for split in ("train", "validation")}
    names, numbers = _classes(parts["train"].features[column], labels["train"], column)
    result = {}
    for split, count in (("train", options.max_train_examples), ("validation", options.max_eval_blocks)):
        unknown = next((value for value in labels[split] if value not in numbers), None)
        if unknown is not None:
            raise ValueError(
                f"label_column={column!r} holds {unknown!r} in the {split} split, which is none of the {len(names)} "
                f"classes of the train split."
            )
        rows = _sampled_rows(len(parts[split]), count)
        part = parts[split].select_columns("text").select(rows)
        part = part.add_column("label", [numbers[labels[split][row]] for row in rows], feature=ClassLabel(names=names))  # type: ignore[call-arg]
        # What add_example_ids gave the whole split, without a copy of it.
        result[split] = part.add_column(ID_COLUMN, rows) if split == "train" else part  # type: ignore[call-arg]
    return result, names


def _classes(feature: Any, values: list[Any], column: str) -> tuple[list[str], dict[Any, int]]:
    """The classes' names, and the class of each value of the column."""
    if isinstance(feature, ClassLabel):
        names: list[str] = list(feature.names)
        numbers: dict[Any, int] = {i: i for i in range(len(names))}
    elif getattr(feature, "dtype", "").startswith(("int", "uint", "bool")):
        names = [str(int(value)) for value in sorted(set(values))]
        numbers = {value: i for i, value in enumerate(sorted(set(values)))}
    else:
        names = sorted(map(str, set(values)))
        numbers = {value: names.index(str(value)) for value in set(values)}
    if not 2 <= len(names) <= max(len(values) // 2, 2):
        raise ValueError(
            f"label_column={column!r} holds {len(names)} labels in {len(values)} rows: no classes to learn."
        )
    return names, numbers


def _tokenized(part: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """Adds `input_ids`, cut at `block_size`; the text stays, since an example's fingerprint is made of it."""

    def tokenize(texts: list[str]) -> dict[str, Any]:
        return {"input_ids": tokenizer(texts, truncation=True, max_length=block_size)["input_ids"]}

    backend = tokenizer.backend_tokenizer.to_str() if isinstance(tokenizer, PreTrainedTokenizerFast) else ""
    state = [part._fingerprint, type(tokenizer).__name__, backend or sorted(tokenizer.get_vocab().items()), block_size]
    return part.map(
        tokenize,
        batched=True,
        input_columns="text",
        features=datasets.Features({**part.features, "input_ids": datasets.List(datasets.Value("int32"))}),
        new_fingerprint=hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16],
        desc="Tokenizing",
    )


def _image_classification(options: TaskOptions, checkpoint: str | None) -> LearningTask:
    size, statistics, channels = options.image_size, None, None
    if checkpoint:
        config = checkpoint_config(checkpoint)
        channels = getattr(config, "num_channels", None)
        size = size or getattr(config, "image_size", None)
        statistics = _checkpoint_statistics(checkpoint)
    images = load_images(options.dataset, options.image_column, options.label_column, options.image_size)
    train = _sample(add_example_ids(images.splits["train"]), options.max_train_examples)
    train = _redraw_labels(train, len(images.label_names), options)
    mean, std = statistics or channel_statistics(train, images.shape)
    train, holdout = _split(train, options.holdout_share)
    return LearningTask(
        task=options.task,
        name=images.name,
        train=train.with_format("numpy"),
        holdout=holdout and holdout.with_format("numpy"),
        validation=_sample(images.splits["validation"], options.max_eval_blocks).with_format("numpy"),
        fingerprint_columns=("pixel_values", "label"),
        data_collator=ImageCollator(
            images.shape, mean, std, channels or images.shape[0], (size, size) if size else None
        ),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=most_likely,
        labels=tuple(images.label_names),
    )


def _checkpoint_statistics(checkpoint: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that a checkpoint's image processor names, if it has one."""
    try:
        settings = ImageProcessingMixin.get_image_processor_dict(checkpoint)[0]
    except OSError:
        logger.info("%s has no image processor: images are normalised by the training set's own mean", checkpoint)
        return None
    if not settings.get("do_normalize", True) or "image_mean" not in settings:
        return None
    return tuple(settings["image_mean"]), tuple(settings["image_std"])


def _redraw_labels(train: Dataset, classes: int, options: TaskOptions) -> Dataset:
    """Redraws the labels of a share of the rows uniformly; `corrupted` tells where that changed one."""
    if not options.label_noise:
        return train
    ids, labels = np.asarray(train[ID_COLUMN]), np.asarray(train["label"])
    redrawn = _uniform(ids, options.label_noise_seed, "which") < options.label_noise
    drawn = (_uniform(ids, options.label_noise_seed, "label") * classes).astype(np.int64)
    noisy = np.where(redrawn, drawn, labels)
    feature = train.features["label"]
    train = train.remove_columns("label").add_column("label", noisy, feature=feature)  # type: ignore[call-arg]
    return train.add_column(CORRUPTED_COLUMN, noisy != labels)  # type: ignore[call-arg]


def _split(train: Dataset, holdout_share: float | None) -> tuple[Dataset, Dataset | None]:
    """Train and holdout, by a hash of the id."""
    holdout_share = HOLDOUT_SHARE if holdout_share is None else holdout_share
    inside = _uniform(np.asarray(train[ID_COLUMN]), 0, "holdout") < holdout_share
    if holdout_share and (inside.all() or not inside.any()):
        raise ValueError(f"holdout_share={holdout_share} leaves one part of {len(train)} examples empty: give more.")
    kept = train.select(np.flatnonzero(~inside))
    return kept, train.select(np.flatnonzero(inside)) if holdout_share else None


def _sampled_rows(rows: int, count: int | None) -> np.ndarray:
    """So many of the rows, spread over all, in their order: files are often sorted by class or source."""
    if count is None or count >= rows:
        return np.arange(rows)
    return np.sort(np.argsort(_uniform(np.arange(rows), 0, "sample"), kind="stable")[:count])


def _sample(part: Dataset, count: int | None) -> Dataset:
    return part if count is None else part.select(_sampled_rows(len(part), count))


def _uniform(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Numbers in [0, 1), [n], each of which depends on its id alone: SplitMix64 (Steele et al. 2014)."""
    start = hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8]
    state = np.asarray(ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(start, "<u8")
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)) / 2.0**53


class LabelledTextCollator(TextCollator):
    """`TextCollator` for classification: `labels` [n] are the examples' classes."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        batch["labels"] = batch.pop("label")
        return batch


def most_likely(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """The most likely class of each example, [batch]: all that evaluation keeps."""
    return (outputs[0] if isinstance(outputs, tuple) else outputs).argmax(-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the examples whose most likely class is the label."""
    return {"accuracy": float(np.mean(np.asarray(prediction.predictions) == np.asarray(prediction.label_ids)))}
