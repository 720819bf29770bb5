"""Translating with uncertainty: the answer, samples of it with dropout on, and scores of how unsure the model is.

"Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020, arXiv
2006.08344. `Translator` serves any encoder-decoder or decoder-only model that generates; `score_translations` and the
pipeline are built on it.
"""

import copy
import dataclasses
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.sampling import Samples, sample_forward, sample_generate
from hf_efx.core.scoring.scoring_state import base_model, scoring_state
from hf_efx.mc_dropout.bleuvar import mbr_choice, pairwise_bleu
from hf_efx.mc_dropout.scores import Evidence, TokenStatistics, compute_uncertainties, token_statistics, uncertainty_needs

logger = logging.getLogger(__name__)

EMPTY, CUT, UNFINISHED = "empty source", "source truncated", "translation unfinished"
_LOGITS = 2**25  # numbers that a pass over answers may hold
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_ROOM = 16  # tokens beyond twice the source's, rounded up to a power of two, that an answer may have


@dataclass
class TranslationOptions:
    """How translations and samples of them are made, and what is said about them."""

    num_samples: int = field(
        default=10, metadata={"help": "Samples of a source; more give a steadier score, and cost their time."}
    )
    uncertainties: list[str] = field(
        default_factory=lambda: ["bleuvar", "beam_score", "sequence_probability"],
        metadata={"help": "Scores, a column each (higher is less certain); the first is the one that defers."},
    )
    masks: Literal["position", "sequence"] = field(
        default="position",
        metadata={"help": "Dropout masks drawn anew at every position, as in training, or once a sample."},
    )
    sites: list[str] | None = field(
        default=None, metadata={"help": "Patterns of the modules whose dropout is on; without them: all."}
    )
    num_beams: int | None = field(
        default=None,
        metadata={"help": "Beams of answer and samples. Without it: the model's own of the answer, samples greedy."},
    )
    choose: Literal["answer", "mbr"] = field(
        default="answer",
        metadata={
            "help": "The translation: the model's own answer, or the sample most like the others (minimum Bayes risk)."
        },
    )
    src_lang: str | None = field(default=None, metadata={"help": "Language of the sources, of a multilingual model."})
    tgt_lang: str | None = field(default=None, metadata={"help": "Language to translate to, of a multilingual model."})
    truncation: bool = field(
        default=False, metadata={"help": "Cut sources that are longer than the model's positions; else they are refused."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a translation at most. Without it: from the source's length."}
    )
    max_batch_rows: int = field(default=160, metadata={"help": "Rows (sources x samples x beams) of a model call."})
    seed: int = field(default=0, metadata={"help": "Of the masks: the same seed gives the same samples."})

    def __post_init__(self) -> None:
        if self.num_samples == 1 or self.num_samples < 0:
            raise ValueError(f"num_samples={self.num_samples}: one sample has nothing to differ from, give 2 or more.")
        for name in ("num_beams", "max_new_tokens", "max_batch_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more.")
        if self.masks not in ("position", "sequence"):
            raise ValueError(f"masks={self.masks!r} is unknown; choose 'position' or 'sequence'.")
        if self.choose not in ("answer", "mbr"):
            raise ValueError(f"choose={self.choose!r} is unknown; choose 'answer' or 'mbr'.")
        if not self.uncertainties or isinstance(self.uncertainties, str):
            raise ValueError(f"uncertainties={self.uncertainties!r}: expected a list of names, such as ['bleuvar'].")
        self.needs = uncertainty_needs(self.uncertainties)
        if not self.num_samples and (self.choose == "mbr"):
            raise ValueError("num_samples=0 leaves choose='mbr' nothing to choose from: give 2 or more samples.")


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
        ValueError: For languages that are missing or unknown, `num_return_sequences`, a model that doesn't generate.
    """

    def __init__(self, model: Any, tokenizer: Any, options: TranslationOptions | None = None, **generate_kwargs: Any):
        self.options = options or TranslationOptions()
        self.model, self.tokenizer = unwrap_model(model), tokenizer
        base = base_model(self.model)
        if not base.can_generate():
            raise ValueError(f"{type(base).__name__} doesn't generate: load a model for seq2seq or causal LM.")
        if "num_return_sequences" in generate_kwargs:
            number = generate_kwargs["num_return_sequences"]
            raise ValueError(f"num_return_sequences={number}: the samples of a source are num_samples.")
        self._reader = _SourceReader(base, tokenizer, self.options)
        self._generate_kwargs = generate_kwargs
        self._answers = copy.deepcopy(base.generation_config)
        self._answers.update(**{k: v for k, v in generate_kwargs.items() if k not in _DRAWING})
        self._answers.do_sample, self._answers.max_length = False, None
        self._answers.num_beams = self.options.num_beams or self._answers.num_beams or 1
        self._answers.pad_token_id = self._reader.pad

    def __call__(self, sources: Sequence[str], ids: Sequence[int]) -> list[Translation]:
        """Translates sources.

        Args:
            sources: Texts [n]; an empty one isn't given to the model.
            ids: A number [n] for each, by which its masks are drawn.

        Raises:
            ValueError: For a source that is no text, or longer than the model's positions without `truncation`.
        """
        tokens, cut = self._reader.tokens(sources)
        scored = self.options.uncertainties if self.options.num_samples else ["beam_score"]
        nothing = Translation("", "", (), dict.fromkeys(scored, math.nan), EMPTY)
        found = [dataclasses.replace(nothing, source=source) for source in sources]
        groups: dict[int, list[int]] = {}  # by the limit, which so depends on nothing but the source
        for i in sorted(range(len(tokens)), key=lambda i: -len(tokens[i])):
            if tokens[i]:
                groups.setdefault(self._reader.limit(len(tokens[i])), []).append(i)
        rows = max(1, self.options.max_batch_rows // self._answers.num_beams)
        for limit, group in groups.items():
            for start in range(0, len(group), rows):
                places = group[start : start + rows]
                part = self._translate([tokens[i] for i in places], [ids[i] for i in places], limit)
                for i, (translation, samples, scores, finished) in zip(places, part, strict=True):
                    notes = [*([CUT] if i in cut else []), *([] if finished else [UNFINISHED])]
                    found[i] = Translation(sources[i], translation, samples, scores, "; ".join(notes))
        return found

    def check(self, sources: Sequence[str]) -> None:
        """Raises ValueError for a source that can't be translated, before any is; see `__call__`."""
        self._reader.tokens(sources)

    def _translate(self, tokens: list[list[int]], ids: Sequence[int], limit: int) -> Iterator[tuple[Any, ...]]:
        """(translation, samples, scores, whether it was finished) of sources of one limit."""
        inputs = self._reader.batch(tokens, self.model.device)
        answers = self._answer(inputs, limit)
        measured: dict[str, Any] = {"answers": answers.texts}
        names = ["beam_score"] if not self.options.num_samples else self.options.uncertainties
        needs = uncertainty_needs(names)
        if needs & {"answer_log_probs", "answer_lengths"}:
            measured["answer_log_probs"] = self._answer_log_probs(inputs, answers)
            measured["answer_lengths"] = answers.mask.sum(1).cpu().numpy()
        if "token_statistics" in needs:
            measured["token_statistics"] = self._token_statistics(inputs, answers, ids)
        samples: list[tuple[str, ...]] = [()] * len(tokens)
        if self.options.num_samples:
            drawn = self._sample(inputs, ids, limit)
            samples = [tuple(texts) for texts in drawn.texts or ()]
            measured |= {"texts": samples, "sample_log_probs": drawn.log_probs, "sample_lengths": drawn.lengths}
        scores = compute_uncertainties(Evidence(**measured), names)
        for i, answer in enumerate(answers.texts):
            if self.options.choose == "mbr":
                answer = samples[i][mbr_choice(pairwise_bleu(samples[i]))]
            yield answer, samples[i], {name: float(values[i]) for name, values in scores.items()}, answers.finished[i]

    def _sample(self, inputs: dict[str, torch.Tensor], ids: Sequence[int], limit: int) -> Samples:
        options = self.options
        kwargs: dict[str, Any] = {"max_new_tokens": limit, "pad_token_id": self._reader.pad}
        if options.num_beams:
            kwargs["num_beams"] = options.num_beams
        if self._reader.forced is not None:
            kwargs["forced_bos_token_id"] = self._reader.forced
        return sample_generate(
            self.model,
            inputs,
            options.num_samples,
            seed=options.seed,
            ids=list(ids),
            masks=options.masks,
            tokenizer=self.tokenizer,
            max_batch_rows=options.max_batch_rows,
            sites=options.sites,
            **{**self._generate_kwargs, **kwargs},
        )

    def _answer(self, inputs: dict[str, torch.Tensor], limit: int) -> "_Answers":
        """What the model says with dropout off, by its own generation config."""
        config = copy.deepcopy(self._answers)
        config.max_new_tokens = limit
        if self._reader.forced is not None:
            config.forced_bos_token_id = self._reader.forced
        with scoring_state(self.model, "eval"):
            sequences = self.model.generate(**inputs, generation_config=config)
        begin = 1 if self._reader.encoder_decoder else inputs["input_ids"].shape[1]
        targets = sequences[:, begin:]
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        end = torch.isin(targets, torch.tensor([e for e in ends if e is not None], device=targets.device))
        mask = (end.cumsum(1) - end.long()) == 0  # up to the first end token
        if config.forced_bos_token_id is not None and self._reader.encoder_decoder:
            mask[:, 0] &= targets[:, 0] != config.forced_bos_token_id
        texts = self.tokenizer.batch_decode(targets, skip_special_tokens=True)
        return _Answers(sequences, targets, mask, texts, end.any(1).tolist())

    def _reading(self, inputs: dict[str, torch.Tensor], answers: "_Answers", rows: slice) -> dict[str, torch.Tensor]:
        """A batch in which the model reads some answers, each token after those before it."""
        part, sequences = {name: value[rows] for name, value in inputs.items()}, answers.sequences[rows]
        if self._reader.encoder_decoder:
            return {**part, "decoder_input_ids": sequences[:, :-1]}
        seen = torch.cat([part["attention_mask"], torch.ones_like(answers.targets[rows])], 1)[:, :-1]
        batch = {"input_ids": sequences[:, :-1], "attention_mask": seen}
        if "position_ids" in inspect.signature(base_model(self.model).forward).parameters:
            batch["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
        return batch

    def _answer_log_probs(self, inputs: dict[str, torch.Tensor], answers: "_Answers") -> np.ndarray:
        """Total log-probability [n] of each answer."""
        totals = []
        with scoring_state(self.model, "eval"):
            for rows in self._slices(answers, 1):
                targets, mask = answers.targets[rows], answers.mask[rows]
                logits = self.model(**self._reading(inputs, answers, rows)).logits[:, -targets.shape[1] :]
                found = -torch.nn.functional.cross_entropy(logits.float().mT, targets, reduction="none")
                totals.append(torch.where(mask, found.double(), 0).sum(1))  # what is behind the end may be anything
        return torch.cat(totals).cpu().numpy()

    def _token_statistics(
        self, inputs: dict[str, torch.Tensor], answers: "_Answers", ids: Sequence[int]
    ) -> TokenStatistics:
        """What the samples' masks predict while the model reads each answer."""
        options, found = self.options, []
        for rows in self._slices(answers, options.num_samples):
            batch, mask = self._reading(inputs, answers, rows), answers.mask[rows]
            logits = sample_forward(
                self.model, batch, options.num_samples, seed=options.seed, ids=list(ids[rows]), masks=options.masks
            )
            found.append(token_statistics(logits[:, :, -mask.shape[1] :], mask))
        return TokenStatistics.concatenate(found)

    def _slices(self, answers: "_Answers", passes: int) -> Iterator[slice]:
        """Rows of the answers, as many at a time as their logits leave room for."""
        width = answers.sequences.shape[1] * self.model.get_output_embeddings().weight.shape[0]
        step = max(1, _LOGITS // (width * passes))
        return (slice(start, start + step) for start in range(0, len(answers.sequences), step))


@dataclass(frozen=True)
class _Answers:
    """Answers as `generate` gave them, the tokens that the model chose [n, T], and which of these count."""

    sequences: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    texts: list[str]
    finished: list[bool]


class _SourceReader:
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
                f"source {text[:60]!r}... has {len(read[long[0]])} tokens, the model takes {int(room)}: shorten it, or "
                f"give truncation=True to have it cut."
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
