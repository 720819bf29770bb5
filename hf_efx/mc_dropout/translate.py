"""Translating with uncertainty: the answer, samples of it with dropout on, and scores of how unsure the model is.

"Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020, arXiv
2006.08344. `Translator` serves any encoder-decoder or decoder-only model that generates; `score_translations` and the
pipeline are built on it.
"""

import dataclasses
import hashlib
import math
import re
import types
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.decoding import (
    DRAWING,
    at_least_float,
    drawn_tokens,
    generate_by,
    generation_config,
    log_probs_of,
    reads_padding,
    teacher_forcing,
)
from hf_efx.core.scoring.sampling import Samples, check_sampling, sample_forward, sample_generate
from hf_efx.core.scoring.scoring_state import base_model, scoring_state
from hf_efx.mc_dropout.bleu import mbr_choice, mt_metrics, pairwise_bleu
from hf_efx.mc_dropout.options import TranslationOptions
from hf_efx.mc_dropout.scores import (
    OWN_UNCERTAINTIES,
    UNCERTAINTIES,
    Evidence,
    TokenStatistics,
    compute_uncertainties,
    token_statistics,
    uncertainty_needs,
)
from hf_efx.mc_dropout.sources import SourceReader

EMPTY, CUT, UNFINISHED = "empty source", "source truncated", "translation unfinished"
_LOGITS = 2**25  # numbers that a pass over answers may hold


@dataclass(frozen=True)
class Translation:
    """What is said of one source.

    Attributes:
        source: The text.
        translation: What it is translated to; empty for an empty source.
        samples: The texts sampled with dropout on.
        uncertainties: Scores by name, NaN for an empty source.
        note: What happened to it (empty, cut, not finished), or "".
    """

    source: str
    translation: str
    samples: tuple[str, ...]
    uncertainties: dict[str, float]
    note: str = ""


class Translator:
    """A model that translates and says how sure it is.

    Args:
        model: Any transformers model that generates, dropout in its config; used as it is, and left so.
        tokenizer: Its tokenizer.
        options: How; None for the defaults.
        **generate_kwargs: More of `generate`'s own arguments, for answer and samples; with `do_sample=True` and what
            belongs to it the samples alone are drawn.

    Raises:
        ImportError: If sacrebleu is needed and isn't installed.
        ValueError: For a model that doesn't generate or can't be sampled (see `sample_generate`), languages that are
            missing or unknown, an argument that something else says already.
    """

    def __init__(
        self, model: Any, tokenizer: Any, options: TranslationOptions | None = None, **generate_kwargs: Any
    ) -> None:
        self.options = options or TranslationOptions()
        base = base_model(model) if isinstance(model, torch.nn.Module) else model
        if not isinstance(base, PreTrainedModel):
            raise ValueError(f"model={str(model)[:60]!r} is a {type(model).__name__}: load a transformers model.")
        self.model = model  # not what is inside: sampling says once what it unwraps
        self._inner: Any = unwrap_model(model)
        if not base.can_generate():
            raise ValueError(f"{type(base).__name__} doesn't generate: load a model for seq2seq or causal LM.")
        self._reader = SourceReader(base, tokenizer, self.options)
        self._given = self._checked(generate_kwargs)
        self._answer_config()  # raises for what can't work
        if self.options.num_samples:
            check_sampling(model, self.options.masks, self.options.sites, tokenizer, **self._sampling())
            if self.options.choose == "mbr" or "texts" in uncertainty_needs(self.options.scores):
                mt_metrics()

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `generate`, none of which says what the options or the languages say."""
        elsewhere = {"num_return_sequences": "the samples of a source are num_samples"}
        elsewhere |= dict.fromkeys(("max_length", "max_time"), "give max_new_tokens")
        if self._reader.forced is not None:
            elsewhere["forced_bos_token_id"] = "it follows from tgt_lang"
        for name, way in elsewhere.items():
            if given.get(name) is not None:
                raise ValueError(f"{name}={given[name]!r}: {way}; leave it out.")
        forced = {} if self._reader.forced is None else {"forced_bos_token_id": self._reader.forced}
        return {"pad_token_id": self._reader.pad, **given, **forced}

    def _sampling(self) -> dict[str, Any]:
        """Arguments of `generate` by which samples are made, but for their length."""
        beams = {} if self.options.num_beams is None else {"num_beams": self.options.num_beams}
        return {**self._given, **beams, "max_new_tokens": self.options.max_new_tokens or 1}

    def _answer_config(self) -> tuple[GenerationConfig, dict[str, Any]]:
        """The generation config of answers, and what `generate` takes beside it."""
        given = {name: value for name, value in self._given.items() if name not in DRAWING}
        own = base_model(self.model).generation_config.num_beams
        beams = self.options.num_beams or getattr(given.get("generation_config"), "num_beams", None) or own or 1
        limit = self.options.max_new_tokens or 1
        given |= {"num_beams": beams, "do_sample": False, "max_new_tokens": limit}
        return generation_config(self.model, given, self._reader.tokenizer)

    def settings(self) -> dict[str, Any]:
        """What translations and scores depend on beside options, weights and tokenizer, as JSON has it."""
        config, rest = self._answer_config()
        modules = list(self._inner.modules())
        rates = {float(m.p) for m in modules if isinstance(m, torch.nn.Dropout)}
        rates |= {v for m in modules for name, v in vars(m).items() if "drop" in name and isinstance(v, float)}
        made = {"answers": config, "dropout": sorted(rates), "sites": self.options.sites, **rest}
        if self.options.num_samples:
            made["samples"] = check_sampling(
                self.model, self.options.masks, self.options.sites, self._reader.tokenizer, **self._sampling()
            )
        flat: dict[str, Any] = {}
        for name, value in made.items():
            value = value.to_diff_dict() if isinstance(value, GenerationConfig) else value
            flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        hidden = ("transformers_version", "pad_token_id", "_from_model_config")
        flat |= {f"score {name}": UNCERTAINTIES[name] for name in set(self.options.scores) - OWN_UNCERTAINTIES}
        return {name: _told_apart(value) for name, value in flat.items() if not name.endswith(hidden)}

    def __call__(self, sources: Sequence[str], ids: Sequence[int]) -> list[Translation]:
        """Translates sources.

        Args:
            sources: Texts [n]; an empty one isn't given to the model.
            ids: A number [n] for each, by which its masks are drawn.

        Raises:
            ValueError: For a source that is no text, or longer than the model's positions without `truncation`.
        """
        tokens, cut = self._reader.tokens(sources)
        nothing = Translation("", "", (), dict.fromkeys(self.options.scores, math.nan), EMPTY)
        found = [dataclasses.replace(nothing, source=source) for source in sources]
        config, rest = self._answer_config()
        apart = reads_padding(config)
        groups: dict[tuple[int, int], list[int]] = {}  # by the limit, which so depends on nothing but the source
        for i in sorted(range(len(tokens)), key=lambda i: -len(tokens[i])):
            if tokens[i]:
                key = (self._reader.limit(len(tokens[i])), len(tokens[i]) if apart else 0)
                groups.setdefault(key, []).append(i)
        rows = max(1, self.options.max_batch_rows // (config.num_beams or 1))
        for (config.max_new_tokens, _), group in groups.items():
            for start in range(0, len(group), rows):
                places = group[start : start + rows]
                inputs = self._reader.batch([tokens[i] for i in places], self._inner.device)
                part = self._translate(inputs, [ids[i] for i in places], config, rest)
                for i, (translation, samples, scores, finished) in zip(places, part, strict=True):
                    notes = [*([CUT] if i in cut else []), *([] if finished else [UNFINISHED])]
                    found[i] = Translation(sources[i], translation, samples, scores, "; ".join(notes))
        return found

    def check(self, sources: Sequence[str]) -> None:
        """Raises ValueError for a source that can't be translated, before any is; see `__call__`."""
        self._reader.tokens(sources)

    def _translate(
        self, inputs: dict[str, torch.Tensor], ids: list[int], config: GenerationConfig, rest: dict[str, Any]
    ) -> Iterator[tuple[str, tuple[str, ...], dict[str, float], bool]]:
        """(translation, samples, scores, whether it was finished) of each row."""
        options = self.options
        answers = self._answer(inputs, config, rest)
        needs = uncertainty_needs(options.scores)
        measured: dict[str, Any] = {"answers": answers.texts, "length_penalty": float(config.length_penalty or 1)}
        if needs & {"answer_log_probs", "answer_lengths"}:
            measured["answer_log_probs"] = self._answer_log_probs(inputs, answers)
            measured["answer_lengths"] = answers.mask.sum(1).cpu().numpy()
        if "token_statistics" in needs:
            measured["token_statistics"] = self._token_statistics(inputs, answers, ids)
        samples: list[tuple[str, ...]] = [()] * len(ids)
        if options.num_samples:
            drawn = self._sample(inputs, ids, config.max_new_tokens)
            samples = [tuple(texts) for texts in drawn.texts or ()]
            measured |= {"texts": samples, "sample_log_probs": drawn.log_probs, "sample_lengths": drawn.lengths}
        scores = compute_uncertainties(Evidence(**measured), options.scores)
        for i, answer in enumerate(answers.texts):
            if options.choose == "mbr":
                answer = samples[i][mbr_choice(pairwise_bleu(samples[i]))]
            yield answer, samples[i], {name: float(values[i]) for name, values in scores.items()}, answers.finished[i]

    def _sample(self, inputs: dict[str, torch.Tensor], ids: list[int], limit: int | None) -> Samples:
        options = self.options
        return sample_generate(
            self.model,
            inputs,
            options.num_samples,
            seed=options.seed,
            ids=ids,
            masks=options.masks,
            tokenizer=self._reader.tokenizer,
            max_batch_rows=options.max_batch_rows,
            sites=options.sites,
            **{**self._sampling(), "max_new_tokens": limit},
        )

    def _answer(
        self, inputs: dict[str, torch.Tensor], config: GenerationConfig, rest: Mapping[str, Any]
    ) -> "_Answers":
        """What the model says with dropout off, by its own generation config."""
        tokenizer = self._reader.tokenizer
        rest = {**rest, "tokenizer": tokenizer} if config.stop_strings else rest
        with scoring_state(self._inner, "eval"):
            sequences = generate_by(config, self._inner, **inputs, **rest)
        prompt = 1 if self._reader.encoder_decoder else inputs["input_ids"].shape[1]
        tokens = sequences[:, prompt:]
        mask, ends, starts = drawn_tokens(self._inner, config, tokens, prompt)
        mask |= ~mask.any(1, keepdim=True)  # all was forced, or padding
        last = int(config.max_new_tokens or 0) - (config.forced_eos_token_id is not None)
        rows = [row[start:end] for row, start, end in zip(tokens.tolist(), starts, ends, strict=True)]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return _Answers(sequences, tokens, mask, texts, [end < last for end in ends])

    def _answer_log_probs(self, inputs: dict[str, torch.Tensor], answers: "_Answers") -> np.ndarray:
        """Total log-probability [n] of each answer."""
        totals = []
        with scoring_state(self._inner, "eval"):
            for rows, batch in self._readings(inputs, answers, 1):
                tokens, mask = answers.tokens[rows], answers.mask[rows]
                logits = at_least_float(self._inner(**batch).logits[:, -tokens.shape[1] :])
                found = log_probs_of(logits, tokens).double()
                totals.append(torch.where(mask, found, 0).sum(1))  # what is behind the end may be anything
        return torch.cat(totals).cpu().numpy()

    def _token_statistics(
        self, inputs: dict[str, torch.Tensor], answers: "_Answers", ids: list[int]
    ) -> TokenStatistics:
        """What the samples' masks predict while the model reads each answer."""
        options, found = self.options, []
        for rows, batch in self._readings(inputs, answers, options.num_samples):
            logits = sample_forward(
                self.model,
                batch,
                options.num_samples,
                seed=options.seed,
                ids=ids[rows],
                masks=options.masks,
                sites=options.sites,
            )
            mask = answers.mask[rows]
            found.append(token_statistics(logits[:, :, -mask.shape[1] :], mask))
        return TokenStatistics.concatenate(found)

    def _readings(
        self, inputs: Mapping[str, torch.Tensor], answers: "_Answers", passes: int
    ) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Batches in which the model reads answers, as many at a time as their logits leave room for."""
        width = answers.sequences.shape[1] * self._inner.get_output_embeddings().weight.shape[0]
        step = max(1, _LOGITS // (width * passes))
        for start in range(0, len(answers.sequences), step):
            rows = slice(start, start + step)
            part = {name: value[rows] for name, value in inputs.items()}
            yield rows, teacher_forcing(self._inner, part, answers.sequences[rows])


def _code(code: types.CodeType) -> list[Any]:
    """What a function does, as text: what it reads from elsewhere isn't part of it."""
    constants = [_code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code, code.co_names, constants]


def _told_apart(value: Any) -> str:
    """A value as text, equal for equal ones; of one that can't be compared, such as a processor, never the same."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told_apart, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_told_apart(one)}' for name, one in value.items())}}}"
    if isinstance(value, torch.Tensor):
        return repr(value.tolist())
    name = re.sub(" at 0x[0-9a-f]+", "", repr(value))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [*_code(value.__code__), _told_apart([value.__defaults__, value.__kwdefaults__, cells])]
        return f"{name} {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    return f"{name}, which can't be compared with another run's ({uuid.uuid4().hex[:8]})"


@dataclass(frozen=True)
class _Answers:
    """Answers as `generate` gave them, their tokens [n, T], and which of these the model chose."""

    sequences: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    texts: list[str]
    finished: list[bool]
