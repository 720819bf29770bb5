"""Architectures beyond the matrix, and the dense model with masks that a sliced one must equal."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from matrix import ARCHITECTURES, CLASSES, HEADS, LAYERS, LENGTH, VOCABULARY, WIDTH, Architecture
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.adapter import efx_record
from hf_efx.slice_out.apply import SlicedBias
from hf_efx.slice_out.layers import SlicedMember
from hf_efx.slice_out.schedule import inclusion_probability

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def _variant(name: str, like: str, **changes: Any) -> Architecture:
    fields = vars(BY_NAME[like]) | {"name": name} | changes
    return Architecture(**fields)


MORE = (
    _variant(
        "qwen2",
        "llama",
        model_class="Qwen2ForCausalLM",
        config=lambda: transformers.Qwen2Config(
            num_hidden_layers=LAYERS,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    _variant(
        "marian",
        "t5",
        model_class="MarianMTModel",
        config=lambda: transformers.MarianConfig(
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            d_model=WIDTH,
            encoder_ffn_dim=48,
            decoder_ffn_dim=40,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
        ),
    ),
    _variant(
        "t5_gated",
        "t5",
        config=lambda: _changed(BY_NAME["t5"].config(), feed_forward_proj="gated-gelu"),
    ),
    _variant(
        "resnet_bottleneck",
        "resnet",
        config=lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", num_labels=CLASSES
        ),
    ),
)


def _changed(config: Any, **fields: Any) -> Any:
    return type(config)(**{**config.to_dict(), **fields})


def masked(dense: nn.Module, sliced: nn.Module, prefix: str = "") -> nn.Module:
    """Gives a dense model the 0/1 masks, and the scale, that a sliced one's present slices stand for.

    Emitters' outputs are masked, so that products of queries and keys go over kept features alone; what is read is
    masked and scaled, so that neither a bias after a batch norm nor an attention without values comes through.
    """
    (entry,) = efx_record(sliced)["methods"]  # pyright: ignore
    config = entry["config"]
    spans = {spec["emits"]["span"]: (name, spec["span"]) for name, spec in entry["modules"].items() if "span" in spec}
    for name, spec in entry["modules"].items():
        for role in ("emits", "reads"):
            if role not in spec:
                continue
            first, span = spans[spec[role]["span"]]
            emitter = sliced.get_submodule(first)
            kept = getattr(emitter, "base_layer", emitter).emits.current()  # under an adapter of peft
            size, blocks = span["size"], spec[role]["blocks"]
            units = torch.zeros(size, dtype=torch.float64)
            units[(kept.start + torch.arange(kept.width)) % size] = 1
            if role == "reads" and config.get("normalization") == "probabilistic":
                units /= inclusion_probability(size, kept.width, config.get("starts", "aligned"), span["align"])
            elif role == "reads":
                units *= size / kept.width
            _hook(dense.get_submodule(prefix + name), role, units.repeat(blocks), size * blocks)
    return dense


def sliced_sides(model: nn.Module) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
    """Parameters that hold units of a sliced model, the dimension along which they do, and which are kept there."""
    for module in model.modules():
        member: Any = module
        spans = [(getattr(member, role, None), role) for role in ("emits", "reads")]
        for span, role in spans if isinstance(module, (SlicedMember, SlicedBias)) else ():
            if span is None:
                continue
            kept, blocks = span.current(), getattr(module, "blocks", 1)
            units = torch.zeros(span.size, dtype=torch.bool)
            units[(kept.start + torch.arange(kept.width)) % span.size] = True
            last = isinstance(module, (Conv1D, nn.Embedding)) == (role == "emits")
            dim = 0 if member.weight.ndim == 1 else int(last)
            columns = member.weight.shape[dim]
            inside = units.repeat_interleave(columns // (blocks * span.size)).repeat(blocks)
            yield member.weight, dim, inside
            if getattr(member, "bias", None) is not None and (role == "emits" or member.weight.ndim == 1):
                yield member.bias, 0, inside


def _hook(module: nn.Module, role: str, units: torch.Tensor, count: int) -> None:
    conv = isinstance(module, nn.Conv2d) or "Conv2d" in type(module).__name__

    def apply(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[1 if conv else -1]
        mask = units.repeat_interleave(width // count).to(x.dtype)
        return x * (mask.view(1, -1, 1, 1) if conv else mask)

    if role == "emits":
        module.register_forward_hook(lambda m, args, output: apply(output))
    else:
        module.register_forward_pre_hook(lambda m, args: (apply(args[0]), *args[1:]))
