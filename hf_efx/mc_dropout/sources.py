"""Sources as a model's inputs: within its positions, in its languages, padded on the side that it needs."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_efx.mc_dropout.options import TranslationOptions

_ROOM = 16  # tokens beyond twice the source's, rounded up to a power of two, that a translation may have


class SourceReader:
    """Turns sources into the model's inputs, within its positions and in its language."""

    def __init__(self, base: Any, tokenizer: Any, options: TranslationOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.encoder_decoder: bool = base.config.is_encoder_decoder
        self.positions = _positions(base.config, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("the tokenizer has neither a pad nor an end token: set tokenizer.pad_token.")
        self.pad: int = pad
        self.prefix, self.forced = "", None
        self._set_languages()
        if options.max_new_tokens is not None and options.max_new_tokens >= self.positions:
            raise ValueError(
                f"max_new_tokens={options.max_new_tokens}: the model has {self.positions} positions, give fewer."
            )

    def _set_languages(self) -> None:
        options, known = self.options, known_languages(self.tokenizer)
        given = {"src_lang": options.src_lang, "tgt_lang": options.tgt_lang}
        name = type(self.tokenizer).__name__
        if not known:
            if wrong := [field for field, value in given.items() if value is not None]:
                raise ValueError(f"{wrong[0]}={given[wrong[0]]!r}: {name} knows no languages, leave it out.")
            return
        marian = all(code.startswith(">>") for code in known)
        for field_name, value in given.items():
            if marian and field_name == "src_lang":
                continue
            code = f">>{value}<<" if marian and value is not None and not value.startswith(">>") else value
            if code not in known:
                shown = ", ".join(c.strip("<>") for c in sorted(known))
                raise ValueError(f"{field_name}={value!r}: {name} translates between languages, choose from {shown}.")
            if marian:
                self.prefix = f"{code} "
        if not marian:
            inputs = self.tokenizer._build_translation_inputs(
                "a", return_tensors="pt", src_lang=options.src_lang, tgt_lang=options.tgt_lang
            )
            self.forced = int(inputs["forced_bos_token_id"])

    def tokens(self, sources: Sequence[str]) -> tuple[list[list[int]], set[int]]:
        """The tokens of each source, none of an empty one, and the places of those that were cut."""
        for i, source in enumerate(sources):
            if not isinstance(source, str):
                raise ValueError(f"sources[{i}]={source!r}: expected a text.")
        filled = [i for i, source in enumerate(sources) if source.strip()]
        texts = [self.prefix + sources[i] for i in filled]
        found: list[list[int]] = [[] for _ in sources]
        if not texts:
            return found, set()
        if self.forced is not None:
            self.tokenizer.src_lang = self.options.src_lang
        room = self.positions if self.encoder_decoder else self.positions - (self.options.max_new_tokens or 1)
        read = self.tokenizer(texts, verbose=False)["input_ids"]
        long = [k for k, ids in enumerate(read) if len(ids) > room]
        if long and not self.options.truncation:
            text = sources[filled[long[0]]]
            raise ValueError(
                f"source {text[:60]!r}... has {len(read[long[0]])} tokens, the model takes {int(room)}: shorten it, "
                f"or give truncation=True to have it cut."
            )
        for k in long:
            read[k] = self.tokenizer(texts[k], truncation=True, max_length=int(room))["input_ids"]
        for i, ids in zip(filled, read, strict=True):
            found[i] = list(ids)
        return found, {filled[k] for k in long}

    def limit(self, length: int) -> int:
        """Tokens that the translation of a source of this length may have: a power of two, so that many share it."""
        if self.options.max_new_tokens is not None:
            return self.options.max_new_tokens
        wanted = 2 ** math.ceil(math.log2(2 * length + _ROOM))
        room = self.positions - (1 if self.encoder_decoder else length)
        return wanted if wanted <= room else 2 ** int(math.log2(room)) if not self.encoder_decoder else int(room)

    def batch(self, tokens: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
        """Padded inputs [n, longest]: on the right of an encoder, on the left of a decoder."""
        width = max(map(len, tokens))
        ids = torch.full((len(tokens), width), self.pad)
        seen = torch.zeros_like(ids)
        for row, mask, values in zip(ids, seen, tokens, strict=True):
            place = slice(0, len(values)) if self.encoder_decoder else slice(width - len(values), width)
            row[place], mask[place] = torch.tensor(values), 1
        return {"input_ids": ids.to(device), "attention_mask": seen.to(device)}


def text_id(text: str) -> int:
    """A number that a text has everywhere: 63 bits of its hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def known_languages(tokenizer: Any) -> set[str]:
    """The language codes that a tokenizer of a multilingual model takes; none of a model of one pair."""
    if marian := getattr(tokenizer, "supported_language_codes", None):
        return set(marian)
    if not callable(getattr(tokenizer, "_build_translation_inputs", None)):
        return set()
    for name in ("lang_code_to_token", "lang_code_to_id", "fairseq_language_codes"):  # M2M100; mBART, NLLB; others
        if codes := getattr(tokenizer, name, None):
            return set(codes)
    return {str(token) for token in tokenizer.all_special_tokens if not str(token).startswith("<")}


def _positions(config: Any, tokenizer: Any) -> float:
    """Tokens that model and tokenizer take at most; infinite for a model without a table of positions."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return min(own, tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else math.inf)
