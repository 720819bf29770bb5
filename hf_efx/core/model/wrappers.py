"""The model inside wrappers, whose own names its modules, its record and its checkpoint go by."""

from typing import Any

from torch import nn

_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, in any order.

    Calling it touches no gradient reducer. Shards (FSDP) stay wrapped: only the wrapper can gather them.
    """
    while True:
        if isinstance(model, _PARALLEL):
            model = model.module
        elif "_orig_mod" in vars(model).get("_modules", {}):  # torch.compile's
            model = model.get_submodule("_orig_mod")
        else:
            return model


def inner_model(model: nn.Module) -> Any:
    """The model that methods go on: its module names stand in the record, and its config holds it.

    That is the transformers model inside torch.compile, DataParallel, DistributedDataParallel, an adapter of peft and
    a module of one's own (a sentence embedder, a classifier around a body), because it is what `save_pretrained`
    writes. A module without a transformers model in it is its own.

    Raises:
        ValueError: For a module that holds several transformers models side by side: each has a record of its own.
    """
    found = transformers_models(model)
    if len(found) > 1:
        raise ValueError(
            f"{type(unwrap_model(model)).__name__} holds {len(found)} transformers models ({', '.join(found)}), each "
            f"of which is saved by itself: call this on them one by one, first on its {next(iter(found))}."
        )
    return next(iter(found.values()), unwrap_model(model))


def transformers_models(model: nn.Module) -> dict[str, nn.Module]:
    """The transformers models in a module that lie in no other, each once, by their names inside the wrappers."""
    from transformers import PreTrainedModel  # not at the top: transformers' own loading imports this file

    found: dict[str, nn.Module] = {}
    for name, module in unwrap_model(model).named_modules():
        if isinstance(module, PreTrainedModel) and not any(f"{name}.".startswith(f"{other}.") for other in found):
            found[name] = module
            if not name:
                break
    return found


def refuse_data_parallel(model: nn.Module, what: str) -> None:
    """Raises where DistributedDataParallel holds the parameters that are about to be replaced.

    It reduces the gradients of those that it was built with, so that new ones would differ between processes.

    Args:
        model: As the user has it, wrappers included.
        what: What replaces them.

    Raises:
        ValueError: If the model is wrapped so.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{what} replaces parameters whose gradients DistributedDataParallel reduces: call this on the model "
            f"before it is wrapped."
        )
