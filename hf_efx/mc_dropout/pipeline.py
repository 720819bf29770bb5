"""The pipeline `translation-with-uncertainty`: `import hf_efx`, then `transformers.pipeline` knows it."""

import copy
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.utils.hub import PushToHubMixin

# Whatever imports transformers.pipelines imports this file: what takes long waits until a pipeline is made.
if TYPE_CHECKING:
    from hf_efx.mc_dropout.translate import Translator

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

    Attributes:
        threshold: The threshold that is saved with the model: one given at the start, else that of its
            uncertainty.json, or None.

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
        from hf_efx.mc_dropout.threshold import DeferralThreshold, saved_threshold

        super().__init__(*args, **kwargs)
        if self.tokenizer is None:
            raise ValueError(f"{TASK} needs the model's tokenizer: give tokenizer=.")
        if self.tokenizer.pad_token is None:  # without one the base class would refuse batches
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.pad_token = self.tokenizer.eos_token
        given = self._forward_params.get("defer_above")
        self.threshold = given if isinstance(given, DeferralThreshold) else saved_threshold(self.model)
        self._made: tuple[Any, Translator, float | None] | None = None
        self._settings(self._forward_params)  # what can't work is said now

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, given, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        if not isinstance(input_, str):
            raise ValueError(
                f"input {input_!r}: expected a text, a list or generator of texts, or a data set's column."
            )
        return {"source": input_}

    def _forward(self, input_tensors: dict[str, Any], **given: Any) -> dict[str, Any]:
        from hf_efx.mc_dropout.sources import text_id

        translator, threshold = self._settings(given)
        sources = input_tensors["source"]  # of a batch a list
        texts = [sources] if isinstance(sources, str) else list(sources)
        score = translator.options.scores[0]
        results = [
            {
                "translation": row.translation,
                "uncertainty": row.uncertainties[score],
                "uncertainties": row.uncertainties,
                "deferred": None if threshold is None else row.uncertainties[score] > threshold,
                "samples": list(row.samples),
                "note": row.note,
            }
            for row in translator(texts, [text_id(text) for text in texts])
        ]
        return {"result": results[0] if isinstance(sources, str) else results}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        return model_outputs["result"]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves model, tokenizer and threshold; no code, which the base class would put beside them.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to push them too.
            repo_id: Where to; None for the folder's name.
            **kwargs: Of `push_to_hub`, and of the model's `save_pretrained`.
        """
        of_hub = inspect.signature(PushToHubMixin.push_to_hub).parameters.keys() - {"max_shard_size", "token"}
        own = {name: value for name, value in kwargs.items() if name not in of_hub}
        self.model.save_pretrained(save_directory, **own)
        self.tokenizer.save_pretrained(save_directory)  # pyright: ignore[reportOptionalMemberAccess]
        if self.threshold is not None:
            self.threshold.save(save_directory)
        if push_to_hub:
            kwargs = {name: value for name, value in kwargs.items() if name in {*of_hub, "max_shard_size", "token"}}
            self.push_to_hub(repo_id or Path(save_directory).absolute().name, **kwargs)

    def _settings(self, given: dict[str, Any]) -> "tuple[Translator, float | None]":
        """The translator, and above which score it defers, of these arguments."""
        from hf_efx.mc_dropout.options import TranslationOptions, checked_threshold
        from hf_efx.mc_dropout.translate import Translator

        if self._made is None or self._made[0] != given:
            own, rest = TranslationOptions.split({k: v for k, v in given.items() if k != "defer_above"})
            options = TranslationOptions(**own)
            wanted = given.get("defer_above")
            if wanted is None and (options.num_samples or (self.threshold and self.threshold.num_samples == 0)):
                wanted = self.threshold  # one of samples says nothing of a translation without them
            translator = Translator(self.model, self.tokenizer, options, **rest)
            self._made = dict(given), translator, checked_threshold(wanted, translator)
        return self._made[1:]


PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=TranslationWithUncertaintyPipeline,
    pt_model=(AutoModelForSeq2SeqLM, AutoModelForCausalLM),  # pyright: ignore[reportArgumentType]
    type="text",
)
