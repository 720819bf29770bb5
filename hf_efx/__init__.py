"""hf_efx: research methods for efficient and uncertainty-aware training, over the Hugging Face ecosystem.

Public names are imported when they are first used: `import hf_efx` loads neither torch nor peft. Its one side effect
is two post-import hooks: when transformers loads its quantizer registry, `hf_efx.core.model.loading` registers itself
there, so that plain `AutoModel....from_pretrained` reads efx checkpoints; and when it loads its pipelines,
`hf_efx.mc_dropout.pipeline` does, so that `pipeline("translation-with-uncertainty")` is known. It doesn't matter which
of the two packages was imported first.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from hf_efx.version import __version__

if TYPE_CHECKING:
    from hf_efx.core.data.example_ids import add_example_ids
    from hf_efx.core.model.adapter import get_efx_model, merge_and_unload, unload
    from hf_efx.core.model.block_map import Block
    from hf_efx.core.model.peft_bridge import register_peft
    from hf_efx.core.model.record import EfxConfig
    from hf_efx.core.model.targets import default_targets
    from hf_efx.core.scoring.sampling import dropout_active, sample_forward, sample_generate
    from hf_efx.core.training.arguments import EfxArguments
    from hf_efx.core.training.step_context import step_context
    from hf_efx.core.training.trainer import EfxTrainer, EfxTrainerMixin
    from hf_efx.goldiprox import (
        GoldiProxMixin,
        GoldiProxTrainer,
        ReplayMixin,
        ReplayTrainer,
        SelectionSequence,
    )
    from hf_efx.low_rank import (
        FactorDecayCallback,
        LowRankArguments,
        LowRankConfig,
        LowRankTrainer,
        low_rank_report,
    )
    from hf_efx.mc_dropout import bleuvar, choose_threshold, score_translations
    from hf_efx.prunability import (
        PrunabilityCallback,
        PrunabilityResult,
        generalization_study,
        measure_prunability,
    )
    from hf_efx.rho_loss import (
        IrreducibleLosses,
        RHOLossArguments,
        RHOLossArgumentsMixin,
        RHOLossMixin,
        RHOLossTrainer,
        compute_irreducible_losses,
        cross_fit_irreducible_losses,
        load_irreducible_losses,
        push_irreducible_losses,
        register_selection_function,
        save_irreducible_losses,
        select_examples,
        train_irreducible_model,
    )
    from hf_efx.slice_out import SliceOutCallback, SliceOutConfig, slice_out_report
    from hf_efx.targeted_dropout import (
        PruningCurve,
        PruningCurveCallback,
        PruningReport,
        TargetedDropoutCallback,
        TargetedDropoutConfig,
        prune,
        pruning_curve,
        shrink,
    )

_PUBLIC = {
    "hf_efx.core.model.adapter": ("get_efx_model", "merge_and_unload", "unload"),
    "hf_efx.core.training.arguments": ("EfxArguments",),
    "hf_efx.core.model.block_map": ("Block",),
    "hf_efx.core.model.record": ("EfxConfig",),
    "hf_efx.core.model.targets": ("default_targets",),
    "hf_efx.core.data.example_ids": ("add_example_ids",),
    "hf_efx.core.model.peft_bridge": ("register_peft",),
    "hf_efx.core.scoring.sampling": ("dropout_active", "sample_forward", "sample_generate"),
    "hf_efx.core.training.step_context": ("step_context",),
    "hf_efx.core.training.trainer": ("EfxTrainer", "EfxTrainerMixin"),
    "hf_efx.goldiprox": (
        "GoldiProxMixin",
        "GoldiProxTrainer",
        "ReplayMixin",
        "ReplayTrainer",
        "SelectionSequence",
    ),
    "hf_efx.low_rank": (
        "FactorDecayCallback",
        "LowRankArguments",
        "LowRankConfig",
        "LowRankTrainer",
        "low_rank_report",
    ),
    "hf_efx.mc_dropout": ("bleuvar", "choose_threshold", "score_translations"),
    "hf_efx.prunability": (
        "PrunabilityCallback",
        "PrunabilityResult",
        "generalization_study",
        "measure_prunability",
    ),
    "hf_efx.rho_loss": (
        "IrreducibleLosses",
        "RHOLossArguments",
        "RHOLossArgumentsMixin",
        "RHOLossMixin",
        "RHOLossTrainer",
        "compute_irreducible_losses",
        "cross_fit_irreducible_losses",
        "load_irreducible_losses",
        "push_irreducible_losses",
        "register_selection_function",
        "save_irreducible_losses",
        "select_examples",
        "train_irreducible_model",
    ),
    "hf_efx.slice_out": ("SliceOutCallback", "SliceOutConfig", "slice_out_report"),
    "hf_efx.targeted_dropout": (
        "PruningCurve",
        "PruningCurveCallback",
        "PruningReport",
        "TargetedDropoutCallback",
        "TargetedDropoutConfig",
        "prune",
        "pruning_curve",
        "shrink",
    ),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_efx' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("transformers.quantizers.auto")
def _register_loading(module: Any) -> None:
    importlib.import_module("hf_efx.core.model.loading")


@wrapt.when_imported("transformers.pipelines")
def _register_pipeline(module: Any) -> None:
    importlib.import_module("hf_efx.mc_dropout.pipeline")
