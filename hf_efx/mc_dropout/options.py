"""Options of translating with uncertainty."""

import dataclasses
import math
from collections.abc import Mapping
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
        metadata={
            "help": "Dropout masks 'position' draws anew at every position, as in training, 'sequence' once a sample: "
            "one draw of the weights. They tell shifted sources apart alike."
        },
    )
    sites: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules whose dropout is on, such as 'encoder' or 'decoder.layers.0'; without them all. Fewer "
            "make samples more alike. An empty list with do_sample=True draws by temperature alone."
        },
    )
    num_beams: int | None = field(
        default=None,
        metadata={
            "help": "Beams of answer and samples. Without it: the model's own of the answer, samples greedy, which is "
            "several times as fast."
        },
    )
    choose: Literal["answer", "mbr"] = field(
        default="answer",
        metadata={
            "help": "The translation: 'answer' is the model's own, 'mbr' the sample most like the others (minimum "
            "Bayes risk), with what dropout did to it."
        },
    )
    src_lang: str | None = field(default=None, metadata={"help": "Language of the sources, of a multilingual model."})
    tgt_lang: str | None = field(default=None, metadata={"help": "Language to translate to, of a multilingual model."})
    truncation: bool = field(
        default=False,
        metadata={
            "help": "Cut sources longer than the model's positions, and say so in the note: what is behind is not "
            "translated. Without it they are refused."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a translation at most. Without it: from the source's length."}
    )
    max_batch_rows: int = field(
        default=160,
        metadata={"help": "Rows (sources x samples x beams) of a model call: more are faster and take more memory."},
    )
    seed: int = field(default=0, metadata={"help": "Of the masks: the same seed gives the same samples."})

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_beams", "max_new_tokens", "max_batch_rows", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}={value!r}: expected an integer.")
            if value is not None and value < 1 and name not in ("num_samples", "seed"):
                raise ValueError(f"{name}={value}: expected 1 or more.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: expected 0 or more, below 2^63.")
        if self.num_samples == 1 or self.num_samples < 0:
            raise ValueError(f"num_samples={self.num_samples}: one sample has nothing to differ from, give 2 or more.")
        for name, known in (("masks", ("position", "sequence")), ("choose", ("answer", "mbr"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose {known[0]!r} or {known[1]!r}.")
        names = self.uncertainties
        if not names or isinstance(names, str) or len(set(names)) < len(names):
            raise ValueError(f"uncertainties={names!r}: expected a list of different names, such as ['bleuvar'].")
        needs = uncertainty_needs(names)
        if "token_statistics" in needs and self.sites is not None and not self.sites:
            raise ValueError("sites=[] leaves scores of tokens without dropout to differ by: leave them, or it, out.")
        if not self.num_samples and self.choose == "mbr":
            raise ValueError("num_samples=0 leaves choose='mbr' nothing to choose from: give 2 or more samples.")

    @property
    def scores(self) -> list[str]:
        """The scores that are made: without samples the beam score alone."""
        return self.uncertainties if self.num_samples else ["beam_score"]

    @classmethod
    def split(cls, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those of some keyword arguments that are fields, and the others."""
        names = {f.name for f in dataclasses.fields(cls)}
        return (
            {name: value for name, value in given.items() if name in names},
            {name: value for name, value in given.items() if name not in names},
        )


def checked_threshold(defer_above: float | DeferralThreshold | None, translator: Any) -> float | None:
    """The number above which a Translator's first score defers; None for none.

    Raises:
        ValueError: For one that isn't finite, or a threshold made with another score, samples, masks or model.
    """
    if isinstance(defer_above, DeferralThreshold):
        defer_above.check(
            score=translator.options.scores[0],
            num_samples=translator.options.num_samples,
            masks=translator.options.masks,
            model=None if defer_above.model is None else weights_fingerprint(translator.model),
            generation=None if defer_above.generation is None else translator.settings(),
        )
        return defer_above.defer_above
    if defer_above is not None and not math.isfinite(defer_above):
        raise ValueError(f"defer_above={defer_above!r}: expected a finite number.")
    return defer_above
