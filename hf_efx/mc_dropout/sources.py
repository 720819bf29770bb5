"""Sources as a model's inputs: within its positions, in its languages, padded on the side that it needs."""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_efx.mc_dropout.options import TranslationOptions

logger = logging.getLogger(__name__)

_ROOM = 16  # tokens beyond twice the source's, rounded up to a power of two, that a translation may have


class SourceReader:
    """Turns sources into the model's inputs.

    Args:
        base: The transformers model.
        tokenizer: Its tokenizer, which is left as it is.
        options: How to translate.

    Attributes:
        encoder_decoder: Whether the model has an encoder.
        pad: The token that pads.
        forced: The token of the target language that translations begin with, of a model that has one.

    Raises:
        ValueError: For languages that are missing or unknown, a tokenizer without pad and end token, more new tokens
            than the model has positions.
    """

    def __init__(self, base: Any, tokenizer: Any, options: TranslationOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.encoder_decoder: bool = base.config.is_encoder_decoder
        self._positions = _positions(base.config, tokenizer)
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has neither a pad nor an end token: set tokenizer.pad_token.")
        self.pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if not self.encoder_decoder and (tokenizer.pad_token_id is None or tokenizer.padding_side != "left"):
            logger.info("%s: sources are padded on the left, by token %d", type(base).__name__, self.pad)
        self._codes = known_languages(tokenizer)
        self._prefixes = any(code.startswith(">>") for code in self._codes)
        self.forced: int | None = None
        self._check_languages()
        if options.max_new_tokens is not None and options.max_new_tokens >= self._positions:
            raise ValueError(
                f"max_new_tokens={options.max_new_tokens}: the model has {self._positions} positions, give fewer."
            )

    def _check_languages(self) -> None:
        options = self.options
        given = {"src_lang": options.src_lang, "tgt_lang": options.tgt_lang}
        if self._prefixes:  # of the target alone, and a source may bring it
            given = {name: value for name, value in given.items() if name == "tgt_lang" and value is not None}
        for name, value in given.items():
            if not self._codes and value is not None:
                raise ValueError(
                    f"{name}={value!r}: {type(self.tokenizer).__name__} knows no languages, leave it out."
                )
            if self._codes and self._code(value) not in self._codes:
                raise ValueError(f"{name}={value!r}: {self._choice()}")
        if self._codes and not self._prefixes:
            with self._languages():
                inputs = self.tokenizer._build_translation_inputs(
                    "a", return_tensors="pt", src_lang=options.src_lang, tgt_lang=options.tgt_lang
                )
            self.forced = int(inputs["forced_bos_token_id"])

    def _code(self, language: str | None) -> str | None:
        return f">>{language}<<" if self._prefixes and not str(language).startswith(">>") else language

    def _choice(self) -> str:
        codes = ", ".join(code.strip("<>") for code in sorted(self._codes))
        return f"{type(self.tokenizer).__name__} translates between languages, choose from {codes}."

    @contextmanager
    def _languages(self) -> Iterator[None]:
        """The tokenizer reads the source language, and is put back afterwards."""
        if not self._codes or self._prefixes:
            yield
            return
        kept = self.tokenizer.src_lang, self.tokenizer.tgt_lang
        try:
            self.tokenizer.src_lang = self.options.src_lang
            yield
        finally:
            self.tokenizer.src_lang, self.tokenizer.tgt_lang = kept

    def tokens(self, sources: Sequence[str]) -> tuple[list[list[int]], set[int]]:
        """The tokens of each source, none of an empty one, and the places of those that were cut.

        Raises:
            ValueError: For what isn't a text, a source that is too long, or that lacks its language's code.
        """
        for i, source in enumerate(sources):
            if not isinstance(source, str):
                raise ValueError(f"sources[{i}]={source!r}: expected a text.")
        places = [i for i, source in enumerate(sources) if source.strip()]
        found: list[list[int]] = [[] for _ in sources]
        if not places:
            return found, set()
        texts = [self._with_code(sources[i]) for i in places]
        room = self._positions if self.encoder_decoder else self._positions - (self.options.max_new_tokens or 1)
        with self._languages():
            read = self.tokenizer(texts, verbose=False)["input_ids"]
            long = [k for k, ids in enumerate(read) if len(ids) > room]
            if long and not self.options.truncation:
                raise ValueError(
                    f"source {sources[places[long[0]]][:60]!r}... has {len(read[long[0]])} tokens, the model takes "
                    f"{int(room)}: shorten it, or give truncation=True to have it cut."
                )
            for k in long:
                read[k] = self.tokenizer(texts[k], truncation=True, max_length=int(room))["input_ids"]
        for i, ids in zip(places, read, strict=True):
            found[i] = list(ids)
        return found, {places[k] for k in long}

    def _with_code(self, source: str) -> str:
        """The source, in front of it the code of the language that it is to be translated to, where there is one."""
        if not self._prefixes:
            return source
        if self.options.tgt_lang is not None:
            return f"{self._code(self.options.tgt_lang)} {source}"
        if source.split()[0] not in self._codes:
            raise ValueError(f"tgt_lang=None, and source {source[:60]!r} begins with no code: {self._choice()}")
        return source

    def limit(self, length: int) -> int:
        """Tokens that the translation of a source of this length may have: a power of two, so that many share it."""
        if self.options.max_new_tokens is not None:
            return self.options.max_new_tokens
        wanted = 2 ** math.ceil(math.log2(2 * length + _ROOM))
        if self.encoder_decoder:
            return int(min(wanted, self._positions - 1))
        room = self._positions - length
        return wanted if wanted <= room else 2 ** int(math.log2(room))

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
    if codes := getattr(tokenizer, "lang_code_to_token", None):  # M2M100, whose codes aren't its tokens
        return set(codes)
    return {str(token) for token in tokenizer.all_special_tokens if not str(token).startswith("<")}


def _positions(config: Any, tokenizer: Any) -> float:
    """Tokens that model and tokenizer take at most; infinite for a model without a table of positions."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return min(own, tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else math.inf)
