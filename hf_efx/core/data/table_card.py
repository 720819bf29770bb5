"""The card of a table: what it holds, how it is used, its figures and a picture of them."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from hf_efx.core.files import write_atomically
from hf_efx.core.results.card import TEMPLATES, markdown_table, settings_table
from hf_efx.core.results.evidence import versions
from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
PLOT_FILE = "histogram.png"


@dataclass(frozen=True)
class TableCard:
    """What a table's card says beside its settings.

    Attributes:
        title: The table in a few words.
        description: What it is and how it was made, in Markdown.
        columns: What each column means, by name.
        usage: Python that loads and uses it; `{source}` stands for the folder or repository.
        figures: Statistics by name, for a table.
        caption: What the plot shows.
        tags: Tags beside `hf_efx`.
        citations: BibTeX entries, from `hf_efx.registry`.
    """

    title: str
    description: str
    columns: Mapping[str, str]
    usage: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    caption: str = "Histogram"
    tags: Sequence[str] = ()
    citations: Sequence[str] = ()


def histogram(dataset: Dataset, column: str, bins: int = 60) -> dict[str, Any]:
    """Statistics of a column of numbers, or of lists of numbers, in two passes that hold a piece of it at a time.

    Returns:
        `count`, `mean`, `std`, `min`, `max` as Python numbers; `edges` [bins + 1] and `counts` [bins].
    """
    count, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    for values in _values(dataset, column):
        count += len(values)
        total += float(values.sum())
        squares += float(np.square(values).sum())
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if not count:
        return {"count": 0, "edges": np.zeros(bins + 1), "counts": np.zeros(bins, np.int64)}
    mean = total / count
    edges = np.histogram_bin_edges([low, high], bins)
    counts = np.zeros(bins, np.int64)
    for values in _values(dataset, column):
        counts += np.histogram(values, edges)[0]
    figures = {
        "count": count,
        "mean": mean,
        "std": math.sqrt(max(squares / count - mean**2, 0.0)),
        "min": low,
        "max": high,
    }
    return {**figures, "edges": edges, "counts": counts}


def plot_histogram(figures: Mapping[str, Any], path: Path, xlabel: str) -> None:
    """Draws what `histogram` gave into a picture. Raises ImportError, naming the extra, without matplotlib."""
    pyplot = matplotlib_pyplot()
    drawing, axes = pyplot.subplots(figsize=(6, 3.2))
    axes.stairs(figures["counts"], figures["edges"], fill=True)
    axes.set(xlabel=xlabel, ylabel="examples", yscale="log" if figures["count"] else "linear")
    drawing.tight_layout()
    save_figure(drawing, path)


def _values(dataset: Dataset, column: str) -> Iterator[np.ndarray]:
    """A column's numbers as float64, piece by piece."""
    for table in dataset.select_columns(column).with_format("arrow").iter(100_000):
        for chunk in table.column(column).chunks:  # type: ignore[union-attr]
            while isinstance(chunk, pa.ListArray | pa.LargeListArray):
                chunk = chunk.flatten()
            if len(chunk):
                yield chunk.to_numpy(zero_copy_only=False).astype(np.float64)


def write_table_card(
    folder: Path,
    dataset: Dataset,
    settings: Mapping[str, Any],
    card: TableCard,
    plot: Callable[[Path], object] | None,
    source: str,
    hub: bool,
) -> None:
    """Writes a table's card and, where matplotlib is installed, its picture; `hub` adds what the viewer goes by."""
    if plot is not None:
        try:
            plot(folder / PLOT_FILE)
        except ImportError as error:
            logger.warning("The card of %s gets no picture: %s", source, error)
    data = DatasetCardData(tags=list(dict.fromkeys(["hf_efx", settings["kind"], *card.tags])))
    if hub:  # what the viewer and load_dataset go by
        data["configs"] = [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
        ]
        info = copy.deepcopy(dataset.info)
        info.splits, info.download_size, info.dataset_size = None, None, None
        DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    columns = [
        (f"`{name}`", f"`{_type(kind)}`", card.columns.get(name, "")) for name, kind in dataset.features.items()
    ]
    figures = [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in card.figures.items()]
    body = TEMPLATES.get_template("table_card.md.jinja").render(
        card=card,
        columns=markdown_table(("column", "type", "meaning"), columns),
        figures=markdown_table(("figure", "value"), figures),
        settings=settings_table(settings),
        versions=settings_table(versions()),
        plot=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        source=source,
        hub=hub,
    )
    text = DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body.replace('{source}', source)}")
    write_atomically(folder / CARD_FILE, str(text))


def _type(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    return f"list<{_type(inner)}>" if inner is not None else str(getattr(feature, "dtype", feature))
