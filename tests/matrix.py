"""The common test matrix: one row for each method and architecture. tests/test_matrix.py and
tests/test_matrix_processes.py run every test on every row.

A new method joins with one line in `METHOD_ROWS`; a new architecture with one `Architecture`. Models are built from
configs, tiny and without dropout, so that a test can ask for equal numbers.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

import hf_efx
from hf_efx.core.model.method_config import EfxMethodConfig

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, CLASSES = 2, 32, 4, 64, 12, 5


@dataclass(frozen=True, eq=False)
class Architecture:
    """A tiny model of one architecture.

    Attributes:
        name: Part of the test's name.
        model_class: Its class in transformers.
        auto_class: The Auto class that loads it.
        config: A function that makes its config.
        inputs: A function that draws a batch of that many examples, labels included, from the torch generator.
        checkpointing: Whether transformers lets it checkpoint gradients.
        lora_targets: Modules that a LoRA goes on.
        parts: Two disjoint sets of modules, for composing two configs.
        renamed_on_save: Whether transformers saves the dense model under an older layout's names, which its own
            Trainer then can't resume from, and ours can: it warns of missing keys and trains on from random layers.
        unmoved: Parameters that no gradient reaches, with the reason beside them.
    """

    name: str
    model_class: str
    auto_class: str
    config: Callable[[], transformers.PreTrainedConfig]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    lora_targets: list[str]
    parts: tuple[list[str] | str, list[str] | str]
    checkpointing: bool = True
    renamed_on_save: bool = False
    unmoved: tuple[str, ...] = ()

    def build(self, seed: int = 0) -> Any:
        """The dense model with seeded random weights."""
        return copy.deepcopy(_dense(self, seed))

    def build_with(self, seed: int = 0, **fields: Any) -> Any:
        """The same with other values in some fields of its config."""
        torch.manual_seed(seed)
        config = self.config()
        config.update(fields)
        return getattr(transformers, self.model_class)(config).eval()

    def batch(self, size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        """A seeded batch."""
        torch.manual_seed(1000 + seed)
        return self.inputs(size)

    @property
    def auto(self) -> Any:
        """The Auto class itself."""
        return getattr(transformers, self.auto_class)


@dataclass(frozen=True, eq=False)
class Row:
    """A method on an architecture.

    Attributes:
        method: Name in `hf_efx.registry.METHODS`.
        architecture: The architecture.
        config: A function that makes the method's config, with the fields that it is given.
        changes_skeleton: Whether checkpoints need hf_efx.
        by_peft: Whether `peft.get_peft_model` takes the config.
        full_size: Fields with which layers are as large as dense ones, where checkpoints need hf_efx.
        callbacks: A function that makes the callbacks which another Trainer than ours needs.
        fsdp: Whether it trains with sharded weights; where not, it must refuse them.
    """

    method: str
    architecture: Architecture
    config: Callable[..., EfxMethodConfig]
    changes_skeleton: bool
    by_peft: bool
    full_size: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[TrainerCallback]] = list
    fsdp: bool = True

    @property
    def id(self) -> str:
        """Name in the test's id."""
        return f"{self.method}-{self.architecture.name}"

    def build(self, seed: int = 0, **fields: Any) -> Any:
        """The efx model, its parameters moved off their starting values, so that one that a test loses shows."""
        if fields:
            return perturb(hf_efx.get_efx_model(self.architecture.build(seed), self.config(**fields)))
        return copy.deepcopy(_efx(self, seed))


@functools.cache
def _dense(architecture: Architecture, seed: int) -> Any:
    return architecture.build_with(seed)


@functools.lru_cache(maxsize=4)  # tests come row by row
def _efx(row: Row, seed: int) -> Any:
    return perturb(hf_efx.get_efx_model(row.architecture.build(seed), row.config()))


def perturb(model: nn.Module, scale: float = 0.02) -> Any:
    """Adds seeded noise to every floating-point parameter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)
    return model


@contextmanager
def training_step(model: nn.Module, step: int = 0) -> Iterator[None]:
    """Training mode and a training step, for a model with methods that act there alone; nothing for others."""
    context = hf_efx.step_context(model)
    if context is None:
        yield
        return
    mode = model.training
    model.train()
    context.begin_step(step)
    yield
    context.end_step()
    model.train(mode)


@torch.no_grad()
def logits(model: Any, row: Row) -> torch.Tensor:
    """What the model, put into evaluation mode, makes of the row's batch."""
    return model.eval()(**cast(row, next(model.parameters()).dtype)).logits


def cast(row: Row, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The row's batch, its floating-point values in that dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in row.architecture.batch().items()}


def _tokens(size: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (size, LENGTH))


def _causal_lm(size: int) -> dict[str, torch.Tensor]:
    tokens = _tokens(size)
    return {"input_ids": tokens, "labels": tokens}


def _pairs(size: int) -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(size), "labels": _tokens(size)}


def _sequences(size: int) -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(size), "labels": torch.randint(CLASSES, (size,))}


def _images(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(size, 3, 16, 16), "labels": torch.randint(CLASSES, (size,))}


ARCHITECTURES = (
    Architecture(
        name="gpt2",
        model_class="GPT2LMHeadModel",
        auto_class="AutoModelForCausalLM",
        config=lambda: transformers.GPT2Config(
            n_layer=LAYERS,
            n_embd=WIDTH,
            n_head=HEADS,
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        inputs=_causal_lm,
        lora_targets=["c_attn", "c_fc"],
        parts=(["c_attn"], ["mlp.c_fc", "mlp.c_proj"]),
    ),
    Architecture(
        name="llama",
        model_class="LlamaForCausalLM",
        auto_class="AutoModelForCausalLM",
        config=lambda: transformers.LlamaConfig(
            num_hidden_layers=LAYERS,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,  # grouped queries
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        ),
        inputs=_causal_lm,
        lora_targets=["q_proj", "down_proj"],
        parts=(["q_proj", "k_proj"], ["up_proj", "down_proj"]),
    ),
    Architecture(
        name="bert",
        model_class="BertForSequenceClassification",
        auto_class="AutoModelForSequenceClassification",
        config=lambda: transformers.BertConfig(
            num_hidden_layers=LAYERS,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_attention_heads=HEADS,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=CLASSES,
        ),
        inputs=_sequences,
        lora_targets=["query", "intermediate.dense"],
        parts=(["query", "key"], ["intermediate.dense"]),
        unmoved=("key.bias",),  # softmax ignores what is added to every score alike
    ),
    Architecture(
        name="t5",
        model_class="T5ForConditionalGeneration",
        auto_class="AutoModelForSeq2SeqLM",
        config=lambda: transformers.T5Config(
            num_layers=LAYERS,
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=48,
            num_heads=HEADS,
            vocab_size=VOCABULARY,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        inputs=_pairs,
        lora_targets=["q", "wo"],
        parts=(["q", "k"], ["wi", "wo"]),
    ),
    Architecture(
        name="vit",
        model_class="ViTForImageClassification",
        auto_class="AutoModelForImageClassification",
        config=lambda: transformers.ViTConfig(
            num_hidden_layers=LAYERS,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=8,
            num_labels=CLASSES,
        ),
        inputs=_images,
        lora_targets=["q_proj", "fc2"],
        parts=(["q_proj", "k_proj"], ["fc1"]),
        renamed_on_save=True,
        unmoved=("k_proj.bias",),
    ),
    Architecture(
        name="resnet",
        model_class="ResNetForImageClassification",
        auto_class="AutoModelForImageClassification",
        config=lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=CLASSES
        ),
        inputs=_images,
        lora_targets=["convolution"],
        parts=(r".*stages\.0\..*convolution", r".*stages\.1\..*convolution"),
        checkpointing=False,
    ),
)

# A method's config and what Row says of it. Ranks are low enough for every layer of every architecture to get smaller.
METHOD_ROWS: dict[str, dict[str, Any]] = {
    "low_rank": {
        "config": lambda **fields: hf_efx.LowRankConfig(**{"rank": 0.25, **fields}),
        "changes_skeleton": True,
        "by_peft": True,
        "full_size": {"rank": 1.0, "only_if_smaller": False},
    },
    "slice_out": {
        "config": lambda **fields: hf_efx.SliceOutConfig(**{"rate": 0.5, "align": 2, **fields}),
        "changes_skeleton": False,
        "by_peft": False,
        "callbacks": lambda: [hf_efx.SliceOutCallback(measure_time=False)],
    },
    "targeted_dropout": {
        "config": lambda **fields: hf_efx.TargetedDropoutConfig(**{"targeting": 0.5, "refresh_every": 2, **fields}),
        "changes_skeleton": False,
        "by_peft": False,
        "callbacks": lambda: [hf_efx.TargetedDropoutCallback()],
        "fsdp": False,
    },
}

ROWS = [Row(method, architecture, **row) for method, row in METHOD_ROWS.items() for architecture in ARCHITECTURES]
