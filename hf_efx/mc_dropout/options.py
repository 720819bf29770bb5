"""Options of translating with uncertainty."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_efx.core.data.fingerprints import weights_fingerprint
from hf_efx.mc_dropout.scores import uncertainty_needs
from hf_efx.mc_dropout.threshold import DeferralThreshold


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
        default=False,
        metadata={"help": "Cut sources longer than the model's positions; else they are refused."},
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


def checked_threshold(
    defer_above: float | DeferralThreshold | None, options: TranslationOptions, model: Any
) -> float | None:
    """The number above which the first of the uncertainties defers; None for none.

    Raises:
        ValueError: For one that isn't finite, or a threshold made with another score, samples, masks or model.
    """
    if isinstance(defer_above, DeferralThreshold):
        defer_above.check(
            score=options.uncertainties[0],
            num_samples=options.num_samples,
            masks=options.masks,
            model=None if defer_above.model is None else weights_fingerprint(model),
        )
        return defer_above.defer_above
    if defer_above is not None and not math.isfinite(defer_above):
        raise ValueError(f"defer_above={defer_above!r}: expected a finite number.")
    return defer_above
