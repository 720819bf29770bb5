"""Tasks that programs train on: which data, as train, holdout and validation with example ids, and which model.

Causal language modelling, text classification and image classification. Without files: the standard library's English
text; the same text labelled by the part of the library that it comes from (`email`, `asyncio`, the language reference,
...: ten classes, 79% right for a bag of words where the largest class holds 17%); scikit-learn's digits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_efx.core.data.image_data import ImageCollator
from hf_efx.core.scoring import losses
from hf_efx.core.scoring.scorer import class_names
from hf_efx.programs.causal_lm import DataOptions, check_fit
from hf_efx.programs.command_line import was_given
from hf_efx.programs.model_options import ModelOptions, checkpoint_config, parse_overrides, scratch_config
from hf_efx.programs.run_folder import data_of_run

CORRUPTED_COLUMN = "corrupted"
_AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "text_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
_HEADS = {  # as transformers names its lists of classes
    "causal_lm": "CAUSAL_LM",
    "text_classification": "SEQUENCE_CLASSIFICATION",
    "image_classification": "IMAGE_CLASSIFICATION",
}
_UNREAD = {  # options of the data that a task doesn't read, and those that nobody does where no data are named
    "causal_lm": ("label_column", "image_column", "image_size"),
    "text_classification": ("mode", "image_column", "image_size"),
    "image_classification": ("text_column", "mode", "block_size", "tokenizer", "vocab_size"),
}
_COLUMNS = ("text_column", "label_column", "image_column")
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# At BERT's own 0.02 a model this small learns little in 300 steps (37% right on the library's text; 68% at 0.1).
_BERT = {"num_attention_heads": 2, "initializer_range": 0.1, **_NO_DROPOUT}
_GPT2 = {"n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_RESNET = {"layer_type": "basic", "depths": [1, 1]}
# New models where none is named: they train in a minute on two CPU cores. "tiny" ones are proxies and give irreducible
# losses.
SIZES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "causal_lm": {
        "small": ("gpt2", {"n_layer": 2, "n_embd": 128, **_GPT2}),
        "tiny": ("gpt2", {"n_layer": 1, "n_embd": 64, **_GPT2}),
    },
    "text_classification": {
        "small": ("bert", {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, **_BERT}),
        "tiny": ("bert", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, **_BERT}),
    },
    "image_classification": {
        "small": ("resnet", {"embedding_size": 32, "hidden_sizes": [32, 64], **_RESNET}),
        "tiny": ("resnet", {"embedding_size": 16, "hidden_sizes": [16, 32], **_RESNET}),
    },
}


SIDE_MODEL_HELP = (
    "'tiny' or 'small' (new ones, as the task asks for), 'type:settings' as in "
    "'bert:hidden_size=32,num_hidden_layers=1', or a checkpoint (of text: with the same tokenizer)."
)


@dataclass
class TaskModelOptions(ModelOptions):
    """Which model; without a word a small one that fits the task."""

    model_type: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={
            "help": "Architecture of a model from scratch, by its transformers name, in its default size. Without it: "
            "a small gpt2, bert or resnet, as the task asks for."
        },
    )


@dataclass
class TaskOptions(DataOptions):
    """Which task, on which data, and how it is split."""

    task: Literal["text_classification", "image_classification", "causal_lm"] = field(
        default="text_classification", metadata={"help": "What is learnt."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Text: a file (.txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .gz of these), a folder of such "
            "files, or a data set on the Hub (name or name:config). Images: a folder of idx files such as "
            "Fashion-MNIST's, or a data set on the Hub. Without it: English text of Python's own library, labelled by "
            "the part of the library that it comes from; scikit-learn's digits."
        },
    )
    mode: Literal["pack", "line"] = field(
        default="line",
        metadata={
            "help": "Causal models: 'line' makes an example of each document, at the cost of padding; 'pack' cuts the "
            "joined documents into full blocks, and each block is an example, with an id of its own."
        },
    )
    block_size: int = field(
        default=64,
        metadata={"help": "Tokens of an example at most. More see more of it, and cost more time and memory each."},
    )
    label_column: str = field(default="label", metadata={"help": "Where a table or a Hub data set holds the labels."})
    image_column: str = field(default="image", metadata={"help": "Where a Hub data set holds the images."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels to which images are resized: smaller is faster, and shows less. Without it the "
            "checkpoint's, or, from scratch, the images' own."
        },
    )
    holdout_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training data that is kept apart, by id, to train an irreducible-loss model on. "
            "More makes its losses better, and leaves less to train on. Nothing means half where such a model is "
            "trained on a holdout, else 0. A table or a sequence goes with the share that it was made with."
        },
    )
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Examples of the source to use at most, holdout included: fewer are faster."}
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training examples, holdout included, whose label is redrawn uniformly (a causal "
            "model's: all its tokens), to see what a method makes of noise. The column 'corrupted' tells where."
        },
    )
    label_noise_seed: int = field(default=0, metadata={"help": "Seed of the label noise."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout_share is not None and not 0 <= self.holdout_share < 1:
            raise ValueError(f"holdout_share={self.holdout_share}: expected a share from 0 to below 1.")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise={self.label_noise}: expected a share from 0 to 1.")
        if self.max_train_examples is not None and self.max_train_examples < 2:
            raise ValueError(f"max_train_examples={self.max_train_examples}: expected 2 or more.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size}: expected 1 pixel or more.")
        for name in (*_UNREAD.get(self.task, ()), *(() if self.dataset else _COLUMNS)):
            if was_given(self, name):
                why = (
                    "without a dataset nothing"
                    if name in _COLUMNS and not self.dataset
                    else f"nothing of task={self.task!r}"
                )
                raise ValueError(f"{name}={getattr(self, name)!r}: {why} reads it. Leave it out.")


@dataclass
class CheckpointTaskOptions(TaskOptions):
    """The task that a checkpoint was trained for, and on which data it is measured.

    Attributes:
        given: Names of the options that the command line gives, which win over those of the checkpoint's run.
    """

    given = frozenset[str]()

    task: Literal["text_classification", "image_classification", "causal_lm"] | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "What the checkpoint was trained for. Without it as its class says."}
    )

    def of_checkpoint(self, name: str) -> "CheckpointTaskOptions":
        """These options; those that aren't given, as the run that made a checkpoint had them, and with its task.

        What is taken from the run, and what differs from it, is printed.

        Args:
            name: A folder or a name on the Hub.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If its class doesn't tell the task.
        """
        classes = checkpoint_config(name).architectures or []
        run, _ = data_of_run(name)
        there = {option: value for option, value in run.items() if value != getattr(self, option)}
        if taken := {option: value for option, value in there.items() if option not in self.given}:
            print(f"as in the run that made {name}: {_named(taken)}")
        if differing := {option: getattr(self, option) for option in there if option in self.given}:
            print(f"as given, other than in the run that made {name}: {_named(differing)}")
        options = dataclasses.replace(self, **{"holdout_share": self.holdout_share or 0.0, **taken})
        if options.task:
            return options
        task: Any = next((task for task, head in _HEADS.items() if class_names(head) & {*classes}), None)
        if task is None:
            raise ValueError(
                f"model_name_or_path={name!r} was saved as {' or '.join(classes) or 'no class at all'}, which doesn't "
                f"tell its task: name it with --task ({', '.join(_HEADS)})."
            )
        return dataclasses.replace(options, task=task)


def _named(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


@dataclass(frozen=True)
class LearningTask:
    """Data of one task, and everything that a Trainer needs beside the model and its arguments.

    Attributes:
        task: As in `TaskOptions`.
        name: What results and cards call the data.
        train: To train on, with `example_id` (int64) and, where labels were redrawn, `corrupted` (bool).
        holdout: The same, of other examples; None where `holdout_share` is 0.
        validation: To evaluate on; its labels are never redrawn.
        fingerprint_columns: What an example is, beside its id, before tokenizing: see
            `example_ids.data_fingerprint`.
        data_collator: Makes batches.
        compute_metrics: `accuracy`, or `perplexity` and `bits_per_byte`.
        preprocess_logits_for_metrics: Keeps evaluation small.
        tokenizer: Of text; None for images.
        labels: The classes; empty for causal models.
    """

    task: str
    name: str
    train: Dataset
    holdout: Dataset | None
    validation: Dataset
    fingerprint_columns: tuple[str, ...]
    data_collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    preprocess_logits_for_metrics: Callable[[Any, torch.Tensor], torch.Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    labels: tuple[str, ...] = ()

    @property
    def loss_task(self) -> losses.Task:
        """The task in the words of `losses.per_example_loss`."""
        return "causal" if self.task == "causal_lm" else "classification"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `compute_metrics` gives, that first which the task is judged by."""
        return ("accuracy",) if self.labels else ("perplexity", "bits_per_byte")

    @property
    def metric(self) -> str:
        """What the task is judged by: `accuracy` (higher is better) or `perplexity` (lower is)."""
        return self.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Whether more of `metric` is better."""
        return self.metric == "accuracy"

    @property
    def auto_class(self) -> str:
        """Name of the transformers class that loads a model of this task."""
        return _AUTO_CLASSES[self.task].__name__

    @property
    def pipeline_tag(self) -> str:
        """The task in the Hub's words."""
        return "text-generation" if self.task == "causal_lm" else self.task.replace("_", "-")

    @property
    def trainer_parts(self) -> dict[str, Any]:
        """Keyword arguments of any Trainer, beside the model, its arguments and the data to train on."""
        return {
            "eval_dataset": self.validation,
            "processing_class": self.tokenizer,
            "data_collator": self.data_collator,
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics,
        }

    def side_model(self, name: str, seed: int, trained: bool = False) -> PreTrainedModel:
        """A model beside the trained one (irreducible losses, proxy, scoring), by the text of an option.

        Args:
            name: A key of `SIZES`, `"type:settings"` as in `"bert:hidden_size=32,num_hidden_layers=1"`, or a
                checkpoint; that of a text model must have the task's tokenizer.
            seed: Of new weights.
            trained: As of `model_init`.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If it can't be made, or has another tokenizer.
        """
        if name in SIZES[self.task]:
            return self.model_init(seed, size=name)
        kind, colon, settings = name.partition(":")
        if colon:
            return self.model_init(seed, TaskModelOptions(model_type=kind, config_overrides=settings))
        if self.tokenizer is not None:
            checkpoint_config(name)  # no checkpoint at all shows first
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(
                    f"the checkpoint {name!r} has another tokenizer than the task: name one for both with "
                    f"--tokenizer, or take a new model such as 'tiny'."
                )
        return self.model_init(seed, TaskModelOptions(model_name_or_path=name), trained=trained)

    def model_init(
        self, seed: int, options: ModelOptions | None = None, size: str = "small", trained: bool = False
    ) -> PreTrainedModel:
        """A model for the task; equal seeds give equal new weights.

        Args:
            seed: Of new weights: a whole model's, or a checkpoint's new head.
            options: Which model; None for a new one of the named size.
            size: A key of `SIZES`, for where the options name no architecture.
            trained: Whether a checkpoint is wanted as it was trained: a new head is refused.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If the options can't be used, the model has no room for the data, or a trained one lacks
                weights for the task.
        """
        options = options or TaskModelOptions()
        config = self._config(options, size)
        torch.manual_seed(seed)
        if name := options.model_name_or_path:
            # A checkpoint's head for other classes is drawn anew; transformers lists what it does so with.
            model, loaded = _AUTO_CLASSES[self.task].from_pretrained(
                name, config=config, ignore_mismatched_sizes=bool(self.labels), output_loading_info=True
            )
            drawn = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
            if trained and drawn:
                saved = " or ".join(config.architectures or ["no class"])
                classes = f" with {len(self.labels)} classes" if self.labels else ""
                raise ValueError(
                    f"model_name_or_path={name!r}, saved as {saved}, has no {drawn[0]!r} for "
                    f"task={self.task!r}{classes}, which would be random: name the task and the data of its "
                    f"training with --task and --dataset."
                )
        else:
            model = _AUTO_CLASSES[self.task].from_config(config)
        if self.tokenizer is not None:
            check_fit(model, self.tokenizer, self.train)
        if self.task == "causal_lm":  # where a class' name tells it nothing, transformers falls back to it and warns
            model.loss_type = "ForCausalLM"
        return model

    def _config(self, options: ModelOptions, size: str) -> PreTrainedConfig:
        options.check()
        settings = parse_overrides(options.config_overrides) if options.config_overrides else {}
        if options.model_name_or_path:
            config: Any = checkpoint_config(options.model_name_or_path)
        else:
            kind, base = (options.model_type, {}) if options.model_type else SIZES[self.task][size]
            config = scratch_config(kind, {**base, **settings}, self.tokenizer)
            if isinstance(self.data_collator, ImageCollator):
                channels, height, _ = self.data_collator.model_shape
                for name, value in {"num_channels": channels, "image_size": height}.items():
                    if hasattr(config, name) and name not in settings:
                        setattr(config, name, value)
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: i for i, name in enumerate(self.labels)}
        if self.labels and self.tokenizer is not None and config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id  # decoders find the last token by it
        return config

    def save_processor(self, folder: str | Path) -> None:
        """Writes what makes a model's inputs beside it: the tokenizer, or the images' normalisation."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        elif isinstance(self.data_collator, ImageCollator):
            self.data_collator.save_pretrained(folder)
