"""Plots, with matplotlib where it is installed (extra `plot`)."""

import importlib
import os
from pathlib import Path
from typing import Any

from hf_efx.core.files import whole_file


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


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int = 120) -> Path:
    """Writes a figure of pyplot's into a picture, whole or not at all, and closes it.

    Args:
        figure: It stays as it is, and can be shown or written again.
        path: Its suffix says which format, PNG without one. Missing folders are made.
        dpi: Pixels an inch.

    Returns:
        The path.
    """
    path = Path(path)
    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format=path.suffix[1:] or "png")
    finally:
        matplotlib_pyplot().close(figure)
    return path
