"""The score above which a translation is deferred, chosen from in-domain data and kept beside the model."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_efx.core.files import write_atomically
from hf_efx.core.results.evidence import versions
from hf_efx.mc_dropout.detection import Scores, finite_scores

logger = logging.getLogger(__name__)

UNCERTAINTY_FILE = "uncertainty.json"


@dataclass(frozen=True)
class DeferralThreshold:
    """A threshold, and what it holds for: other scores, samples or models need their own.

    Attributes:
        defer_above: A source that scores higher is deferred.
        share: Of in-domain sources that were to be deferred.
        score: Name of the score, of `UNCERTAINTIES`.
        num_samples: Samples a source that the score was made from; 0 for a score that needs none.
        masks: "position" or "sequence", as `sample_generate` drew them.
        model: Fingerprint of the model's weights; None where it wasn't recorded, and isn't compared.
        sources: How many it was chosen from.
        generation: How answers and samples were generated (`Translator.settings`): the modules with dropout, its
            rates, beams, temperature; None where it wasn't recorded, and isn't compared.
        versions: Of the libraries that the scores were made with.

    Raises:
        ValueError: For a value that isn't finite, or out of range.
    """

    defer_above: float
    share: float
    score: str
    num_samples: int
    masks: str
    model: str | None
    sources: int
    generation: Mapping[str, str] | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    def __post_init__(self) -> None:
        if not math.isfinite(self.defer_above):
            raise ValueError(f"defer_above={self.defer_above!r}: expected a finite number.")
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share!r}: expected the share to defer, above 0 and below 1.")
        if self.num_samples < 0 or self.num_samples == 1:
            raise ValueError(
                f"num_samples={self.num_samples!r}: expected 2 or more, or 0 for a score without samples."
            )
        if self.masks not in ("position", "sequence"):
            raise ValueError(f"masks={self.masks!r} is unknown; choose 'position' or 'sequence'.")

    def deferred(self, scores: Scores) -> np.ndarray:
        """Which sources to defer, [n] bool. One without a score (NaN), such as an empty one, isn't deferred."""
        return np.asarray(scores, np.float64) > self.defer_above

    def check(
        self,
        *,
        score: str,
        num_samples: int,
        masks: str,
        model: str | None = None,
        generation: Mapping[str, str] | None = None,
    ) -> None:
        """Compares what the threshold was made with to what it is to be used with.

        Args:
            score: As the field.
            num_samples: As the field.
            masks: As the field.
            model: As the field; None isn't compared.
            generation: As the field; None isn't compared.

        Raises:
            ValueError: If they differ; it names both.
        """
        now: dict[str, Any] = {"score": score, "num_samples": num_samples, "masks": masks, "model": model}
        then = {name: getattr(self, name) for name in now}
        if model is None or self.model is None:
            now["model"] = then["model"] = None
        if generation is not None and self.generation is not None:
            for name in sorted({*generation, *self.generation}):
                now[name], then[name] = generation.get(name), self.generation.get(name)
        if wrong := [f"{name}={then[name]!r}, not {now[name]!r}" for name in now if now[name] != then[name]]:
            raise ValueError(
                f"the threshold {self.defer_above:g} was made with {'; '.join(wrong)}: choose one for this setting "
                f"with choose_threshold."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `uncertainty.json` into a folder, such as the model's, whole or not at all.

        Returns:
            The file.
        """
        file = Path(path) / UNCERTAINTY_FILE
        write_atomically(file, json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n")
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DeferralThreshold":
        """Reads what `save` wrote, from the folder or the file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no such file.
        """
        file = Path(path)
        file = file / UNCERTAINTY_FILE if file.is_dir() else file
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} holds no threshold: {error}. Choose it anew with choose_threshold.") from error


def _versions() -> dict[str, str]:
    found = versions()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["sacrebleu"] = importlib.metadata.version("sacrebleu")
    return found


def saved_threshold(model: Any) -> DeferralThreshold | None:
    """The threshold in the uncertainty.json beside a transformers model, in its folder or repository; None for none.

    Raises:
        ValueError: If it can't be read.
    """
    from transformers.utils.hub import cached_file  # here: the rest of this file needs no transformers

    file = model.name_or_path and cached_file(
        model.name_or_path,
        UNCERTAINTY_FILE,
        revision=getattr(model.config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return DeferralThreshold.load(file) if file else None


def choose_threshold(
    scores: Scores,
    share: float = 0.1,
    *,
    score: str = "bleuvar",
    num_samples: int = 10,
    masks: str = "position",
    model: str | None = None,
    generation: Mapping[str, str] | None = None,
) -> DeferralThreshold:
    """Chooses the score above which to defer, so that of these sources a share is deferred, or less where they tie.

    Args:
        scores: [n] of in-domain sources, higher being less certain.
        share: Of them to defer, above 0 and below 1.
        score: Name of the score.
        num_samples: Samples a source that the scores were made from.
        masks: How they were drawn.
        model: Fingerprint of the model's weights: with it the threshold refuses other models.
        generation: `Translator.settings()`: with it the threshold refuses samples made otherwise.

    Raises:
        ValueError: For a score that isn't finite, or an argument out of range.

    Example:
        >>> from hf_efx.mc_dropout import choose_threshold
        >>> threshold = choose_threshold([0.1, 0.5, 0.2, 0.0, 0.9], share=0.2)
        >>> threshold.defer_above, threshold.deferred([0.4, 0.6]).tolist()
        (0.5, [False, True])
    """
    values = np.sort(finite_scores(scores, "scores").reshape(-1))
    if not 0 < share < 1:
        raise ValueError(f"share={share!r}: expected the share to defer, above 0 and below 1.")
    rank = len(values) - 1 - math.floor(share * len(values) + 1e-9)
    threshold = DeferralThreshold(
        float(values[rank]), share, score, num_samples, masks, model, len(values), generation
    )
    above = threshold.deferred(values).mean()
    if above < share / 2:
        logger.warning(
            "share=%g: %.1f%% of %d sources score above %g; they tie or are too few.",
            share,
            100 * above,
            len(values),
            threshold.defer_above,
        )
    return threshold
