"""Plots, with matplotlib where it is installed (extra `plot`)."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def png_axes(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Axes to draw on, which are a PNG at the end; it is there whole or not at all.

    Raises:
        ImportError: If matplotlib isn't installed; it names the extra that installs it.
    """
    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    try:
        yield axes
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)
