"""RHO-LOSS: train on the examples of a large batch whose loss exceeds their irreducible loss the most.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137.
"""

from hf_efx.core.data.example_ids import add_example_ids
from hf_efx.rho_loss.arguments import RHOLossArguments, RHOLossArgumentsMixin
from hf_efx.rho_loss.cross_fit import cross_fit_irreducible_losses
from hf_efx.rho_loss.irreducible import compute_irreducible_losses
from hf_efx.rho_loss.irreducible_table import (
    IrreducibleLosses,
    load_irreducible_losses,
    push_irreducible_losses,
    save_irreducible_losses,
)
from hf_efx.rho_loss.selection import (
    SELECTION_FUNCTIONS,
    Selection,
    SelectionFunction,
    register_selection_function,
    select_examples,
)
from hf_efx.rho_loss.side_models import train_irreducible_model
from hf_efx.rho_loss.trainer import RHOLossMixin, RHOLossTrainer

__all__ = [
    "SELECTION_FUNCTIONS",
    "IrreducibleLosses",
    "RHOLossArguments",
    "RHOLossArgumentsMixin",
    "RHOLossMixin",
    "RHOLossTrainer",
    "Selection",
    "SelectionFunction",
    "add_example_ids",
    "compute_irreducible_losses",
    "cross_fit_irreducible_losses",
    "load_irreducible_losses",
    "push_irreducible_losses",
    "register_selection_function",
    "save_irreducible_losses",
    "select_examples",
    "train_irreducible_model",
]
