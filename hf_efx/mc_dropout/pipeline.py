"""The pipeline `translation-with-uncertainty`: `import hf_efx`, then `transformers.pipeline` knows it."""

import dataclasses
import logging
import os
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from hf_efx.mc_dropout.options import TranslationOptions, checked_threshold
from hf_efx.mc_dropout.sources import text_id
from hf_efx.mc_dropout.threshold import saved_threshold
from hf_efx.mc_dropout.translate import Translator

logger = logging.getLogger(__name__)

TASK = "translation-with-uncertainty"


class TranslationWithUncertaintyPipeline(Pipeline):
    """Translates, and says of each translation how uncertain the model is.

    Arguments, of `pipeline(...)` or of a call: the fields of `TranslationOptions` (`num_samples=0` gives the
    translation and its beam score alone), `defer_above` (a number, or what `choose_threshold` made; without it the
    threshold in the model's uncertainty.json, if there is one) and `generate`'s own. A text has the same samples in
    every batch and every process.

    Returns of a text a dictionary: `translation`, `uncertainty` (the first of the uncertainties, NaN for an empty
    text), `uncertainties` (all of them by name), `deferred` (None without a threshold), `samples` and
    `note` (empty, cut, not finished, or ""). Lists give lists, generators and data sets one after the other.

    Example:
        >>> import hf_efx  # doctest: +SKIP
        >>> from transformers import pipeline  # doctest: +SKIP
        >>> translate = pipeline("translation-with-uncertainty", model="Helsinki-NLP/opus-mt-de-en")  # doctest: +SKIP
        >>> translate("Wo ist der Bahnhof?")["uncertainty"]  # doctest: +SKIP
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threshold = saved_threshold(self.model)
        self._translator: tuple[Any, Translator] | None = None
        self._settings(self._forward_params)  # what can't work is said now

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, given, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        if not isinstance(input_, str):
            raise ValueError(f"input {input_!r}: expected a text, or a list of texts.")
        return {"source": input_}

    def _forward(self, input_tensors: dict[str, Any], **given: Any) -> dict[str, Any]:
        translator, threshold = self._settings(given)
        sources = input_tensors["source"]
        one = isinstance(sources, str)
        sources = [sources] if one else list(sources)
        found = translator(sources, [text_id(source) for source in sources])
        first = next(iter(found[0].uncertainties))
        results = [
            {
                "translation": row.translation,
                "uncertainty": row.uncertainties[first],
                "uncertainties": row.uncertainties,
                "deferred": None if threshold is None else row.uncertainties[first] > threshold,
                "samples": list(row.samples),
                "note": row.note,
            }
            for row in found
        ]
        return {"result": results[0] if one else results}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        return model_outputs["result"]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves model, tokenizer and threshold; no code, which the base class would put beside them."""
        os.makedirs(save_directory, exist_ok=True)
        self.model.save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        if self.threshold is not None:
            self.threshold.save(save_directory)

    def _settings(self, given: dict[str, Any]) -> tuple[Translator, float | None]:
        """The translator and what is deferred, of these arguments."""
        given = dict(given)
        defer_above = given.pop("defer_above", None)
        names = {f.name for f in dataclasses.fields(TranslationOptions)}
        options = TranslationOptions(**{name: value for name, value in given.items() if name in names})
        rest = {name: value for name, value in given.items() if name not in names}
        if self._translator is None or self._translator[0] != (options, rest):
            self._translator = (options, rest), Translator(self.model, self.tokenizer, options, **rest)
        wanted = self.threshold if defer_above is None else defer_above
        return self._translator[1], checked_threshold(wanted, options, self.model) if options.num_samples else None


PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=TranslationWithUncertaintyPipeline,
    pt_model=(AutoModelForSeq2SeqLM, AutoModelForCausalLM),  # pyright: ignore[reportArgumentType]
    type="text",
)
