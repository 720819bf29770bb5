"""The transformers plug-in behind from_pretrained, by its official quantizer registry.

Two cases come through here. A saved efx checkpoint: the skeleton is rewritten from `config.efx` before the weights
load. A dense checkpoint with `quantization_config=EfxConfig([...])`: it loads as it is, then the methods go in. In
both the quantizer takes itself off the model at the end: nothing is quantised, and a model that stays `is_quantized`
refuses `.half()` and can't be trained by the Trainer.

Imported by a hook while transformers itself is being imported: no peft, no modeling_utils at the top.
"""

from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from hf_efx.core.model.record import QUANT_METHOD, EfxConfig, check_record, entry_config

register_quantization_config(QUANT_METHOD)(EfxConfig)


@register_quantizer(QUANT_METHOD)
class EfxQuantizer(HfQuantizer):
    """Rewrites the skeleton before weights load, then removes every trace of a quantizer."""

    requires_calibration = False
    quantization_config: EfxConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses, before any weight is read, configs that would discard what is about to be loaded."""
        if not self.pre_quantized:
            for config in self.quantization_config.methods:
                config.check_pretrained()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        from hf_efx.core.model.adapter import restore_efx_model

        record = getattr(model.config, "efx", None)
        if record is None:
            raise ValueError(
                "config.json says quant_method='hf_efx' but holds no 'efx' entry: it was edited, or written by "
                "something else than save_pretrained. Restore config.json from the checkpoint's source."
            )
        check_record(record)
        check_checkpoint(record, checkpoint_files)
        restore_efx_model(model, record, revive=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hf_efx.core.model.adapter import get_efx_model

        methods = self.quantization_config.methods
        del model.hf_quantizer, model.quantization_method, model.is_quantized
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        if self.pre_quantized:
            model.config.quantization_config = self.quantization_config.to_dict()
            model._weight_conversions = []  # see write_record in record.py
        else:
            del model.config.quantization_config
            get_efx_model(model, methods, pretrained=True)
        return model

    def is_serializable(self) -> bool:
        """Checkpoints can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The model can be trained."""
        return True


def check_checkpoint(record: dict[str, Any], files: list[str] | None) -> None:
    """Checks that the tensors which a record promises are in the files, with their shapes, before anything is loaded.

    transformers would only warn of a missing factor and leave it random.

    Args:
        record: What stands in `config.efx`.
        files: Paths of the checkpoint's weight files; other formats than safetensors are not looked into.

    Raises:
        ValueError: If a file is cut short, or a factor is missing or has another shape.
    """
    files = [str(f) for f in files or [] if str(f).endswith(".safetensors")]
    if not files:
        return
    present: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as f:
                present.update({key: list(f.get_slice(key).get_shape()) for key in f.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no whole safetensors file ({error}): it was cut short while it was written or copied. "
                f"Load an earlier checkpoint, or fetch the file again."
            ) from error
    for entry in record["methods"]:
        for key, shape in entry_config(entry).expected_tensors(entry["modules"]).items():
            if key not in present:
                raise ValueError(
                    f"The checkpoint lacks the factor {key!r} (shape {shape}) which config.efx promises: "
                    f"config.json and the weight files don't belong together, or a shard is missing."
                )
            if present[key] != shape:
                raise ValueError(
                    f"The factor {key!r} has shape {present[key]}, config.efx promises {shape}: config.json and the "
                    f"weight files don't belong together. If a dense model was built from a factorised one's config, "
                    f"take efx and quantization_config out of its config.json; hf_efx.unload(model) before it is "
                    f"saved does that."
                )
