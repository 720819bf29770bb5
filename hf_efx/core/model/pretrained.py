"""Whether a model's weights were loaded, so that an initialisation which discards them is a mistake."""

from collections.abc import Mapping

from torch import nn


def weights_were_loaded(model: nn.Module, targets: Mapping[str, nn.Module]) -> bool:
    """Whether transformers' `from_pretrained` gave any of these modules its weights.

    `config.name_or_path` is no sign of that: `AutoConfig.from_pretrained("gpt2")` sets it for a model whose weights
    are random. transformers marks each parameter that it read from a file (a new head's it doesn't); a deepcopy loses
    those marks, but keeps what loading noted on the model. Weights that were trained in memory or came by
    `load_state_dict` have no sign: there the caller has to say so.

    Args:
        model: The model.
        targets: Modules of it, by name.
    """
    if any(map(_marked, model.parameters())):
        return any(_marked(parameter) for module in targets.values() for parameter in module.parameters())
    # `record.write_record` sets the same attribute on a model that it gives the quantization_config.
    return any("_weight_conversions" in vars(m) and not _factorised(m) for m in model.modules())


def _marked(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _factorised(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "quantization_config")
