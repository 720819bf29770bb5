"""Plots, with matplotlib where it is installed (extra `plot`)."""

import importlib
from typing import Any


def matplotlib_pyplot() -> Any:
    """matplotlib's pyplot on the backend that needs no screen.

    Raises:
        ImportError: If matplotlib isn't installed; it names the extra that installs it.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: install it with pip install 'hf_efx[plot]', or pass --plot false."
        ) from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")
