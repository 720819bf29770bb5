"""Tiny models that translate, with the tokenizers that go with them, in float64 and with dropout."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_efx.core.data.marian_tokenizer import train_marian_tokenizer
from hf_efx.core.data.text_data import byte_tokenizer

POSITIONS = 32
WORDS = "eins zwei drei vier fünf sechs sieben acht neun zehn hundert tausend one two three four five six".split()
SOURCES = ["eins", "zwei hundert", "drei tausend vier", "", "acht neun", "fünf sechs hundert", " \t", "?!", "😀"]
_SEQ2SEQ: dict[str, Any] = {
    "encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": POSITIONS, "dropout": 0.2,
}  # fmt: skip
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "marian": ("MarianConfig", "MarianMTModel", _SEQ2SEQ),
    "bart": ("BartConfig", "BartForConditionalGeneration", _SEQ2SEQ),
    "m2m100": (
        "M2M100Config",
        "M2M100ForConditionalGeneration",
        {**_SEQ2SEQ, "max_position_embeddings": 64},  # more than the pad token's id
    ),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _SEQ2SEQ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.2},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.2},
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 24, "max_position_embeddings": 64, "attention_dropout": 0.2,
        },
    ),
}  # fmt: skip


def tokenizer_of(kind: str, folder: Path, codes: list[str] | None = None) -> Any:
    """A tokenizer: Marian's with those language codes too, mBART's and NLLB's with all of theirs."""
    if kind in ("gpt2", "llama"):
        return byte_tokenizer()
    if kind in ("mbart", "nllb"):
        pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
        if kind == "mbart":
            return transformers.MBart50Tokenizer(vocab=pieces)
        vocabulary = {piece: i for i, (piece, _) in enumerate([("<s>", 0), ("<pad>", 0), ("</s>", 0), *pieces[:1]])}
        letters = sorted({letter for word in WORDS for letter in f"▁{word}"})
        return transformers.NllbTokenizer(vocab=vocabulary | {x: 4 + i for i, x in enumerate(letters)}, merges=[])
    train_marian_tokenizer(folder, [" ".join(WORDS[i:] + WORDS[:i]) for i in range(18)], 40, POSITIONS)
    if kind == "m2m100":
        vocabulary = json.loads((folder / "vocab.json").read_text())
        vocabulary["<s>"] = len(vocabulary)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        return transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "source.spm"))
    if codes:
        vocabulary = json.loads((folder / "vocab.json").read_text())
        vocabulary |= {code: len(vocabulary) + i for i, code in enumerate(codes)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return transformers.MarianTokenizer.from_pretrained(folder)


def model_of(kind: str, tokenizer: Any, **config: Any) -> Any:
    """A model of that kind, whose weights are large enough for outputs to differ and to end."""
    name, model, shape = _KINDS[kind]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = {"pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    tokens |= {"decoder_start_token_id": pad, "forced_eos_token_id": None} if kind not in ("gpt2", "llama") else {}
    codes = tokenizer.lang_code_to_id.values() if isinstance(tokenizer, transformers.M2M100Tokenizer) else []
    vocabulary = max(*tokenizer.get_vocab().values(), *codes) + 1
    torch.manual_seed(0)
    made = getattr(transformers, name)(vocab_size=vocabulary, **{**tokens, **shape, **config})
    made = getattr(transformers, model)(made).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


def built(kind: str, folder: Path, **config: Any) -> tuple[Any, Any]:
    """Model and tokenizer."""
    tokenizer = tokenizer_of(kind, folder)
    return model_of(kind, tokenizer, **config), tokenizer
