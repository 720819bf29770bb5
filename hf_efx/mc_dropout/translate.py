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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.sampling import Samples, sample_forward, sample_generate
from hf_efx.core.scoring.scoring_state import base_model, scoring_state
from hf_efx.mc_dropout.bleuvar import mbr_choice, pairwise_bleu
from hf_efx.mc_dropout.options import TranslationOptions
from hf_efx.mc_dropout.scores import (
    Evidence,
    TokenStatistics,
    compute_uncertainties,
    token_statistics,
    uncertainty_needs,
)
from hf_efx.mc_dropout.sources import SourceReader

logger = logging.getLogger(__name__)

EMPTY, CUT, UNFINISHED = "empty source", "source truncated", "translation unfinished"
_LOGITS = 2**25  # numbers that a pass over answers may hold
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


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
        self.model: Any = unwrap_model(model)
        self.tokenizer = tokenizer
        base = base_model(self.model)
        if not base.can_generate():
            raise ValueError(f"{type(base).__name__} doesn't generate: load a model for seq2seq or causal LM.")
        if "num_return_sequences" in generate_kwargs:
            number = generate_kwargs["num_return_sequences"]
            raise ValueError(f"num_return_sequences={number}: the samples of a source are num_samples.")
        self._reader = SourceReader(base, tokenizer, self.options)
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
