"""Tiny language models and ragged data for the tests of RHOLossTrainer."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_efx.rho_loss.arguments import RHOLossArguments
from hf_efx.rho_loss.irreducible import compute_irreducible_losses
from rho_loss.runs import Recorder, RecordingTrainer

VOCABULARY, ROWS = 16, 48


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Words 2 to 15, padding 0, end 1."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side=side)


def gpt2(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A model of 16 words and 12 positions."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


class Collator(DataCollatorForSeq2Seq):
    """Pads, and counts positions from each row's first token: GPT-2 would count padding on the left."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch


@functools.cache
def texts(rows: int = ROWS) -> Dataset:
    """Rows of 2 to 10 tokens. Some labels are left out, the first always: padding on the left would predict it."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(2, VOCABULARY, draw.integers(2, 11)).tolist() for _ in range(rows)]
    labels = [[-100, *row[1:-1], -100 if len(row) > 5 and i % 3 else row[-1]] for i, row in enumerate(ids)]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    return Dataset.from_dict({**columns, "example_id": draw.permutation(rows) + 100})


@functools.cache
def table(granularity: Any = "example", side: str = "right") -> Dataset:
    """Irreducible losses of `texts`, of another model."""
    words = tokenizer(side)
    return compute_irreducible_losses(
        gpt2(seed=5), texts(), data_collator=Collator(words), processing_class=words,
        granularity=granularity,
    )  # fmt: skip


def text_trainer(
    folder: Path, side: str = "right", model: Any = None, cls: Any = RecordingTrainer, **options: Any
) -> Any:
    """A run on `texts`."""
    granularity = options.get("granularity", "example")
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1}
    fixed = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "selection_ratio": 0.5}
    losses = options.pop("irreducible_losses", None)
    losses = table(granularity, side) if losses is None else losses
    kwargs = {"processing_class": tokenizer(side), "data_collator": Collator(tokenizer(side))}
    return cls(
        gpt2() if model is None else model,
        RHOLossArguments(str(folder), **{**fixed, **defaults, **options}),  # type: ignore[arg-type]
        train_dataset=texts(),
        irreducible_losses=losses,
        **kwargs,
    )


class TokenRecorder(Recorder):
    """Notes the batches that the model is given, too."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:  # not the once that what is scored is compared with what is trained
            self.batches = [*getattr(self, "batches", []), {name: value.clone() for name, value in inputs.items()}]
        return super().compute_loss(model, inputs, *args, **kwargs)
