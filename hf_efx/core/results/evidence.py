"""Evidence: what a study or a benchmark measured, in the JSON form that cards and tables are generated from.

A study adds its rows to `StudyRows` as it goes, so that a killed one goes on; at its end `write_results` writes the
file that is committed.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_efx.core.files import write_atomically
from hf_efx.core.results.statistics import Interval, paired_interval, t_interval
from hf_efx.version import __version__

REQUIRED = ("command", "versions", "machine", "data", "seeds", "rows", "claims")
CLAIM_KEYS = ("claim", "source", "bar", "direction", "measured", "interval", "holds")
# Linux' names of instruction sets that change how fast matrices are multiplied, and in which precision.
CPU_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16")
CPU_UNITS += ("asimd", "sve", "bf16", "i8mm", "sme")  # ARM
NOT_SEPARATED = "not separated"
_SIGNS = {"at_most": "\u2264", "at_least": "\u2265"}


def claim(
    text: str,
    *,
    source: str,
    bar: float,
    measured: float | Sequence[float],
    direction: Literal["at_most", "at_least"],
    interval: Interval | None = None,
    pair: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Sets a measured figure against its bar.

    Args:
        text: What is claimed, in a sentence.
        source: Where the bar comes from: a section of the paper, or `"ours"`.
        bar: The bar.
        measured: The figure, or one for each seed: then the mean counts and `interval` is made from them.
        direction: On which side of the bar the point estimate must lie.
        interval: 95% interval of a single figure, if it has one.
        pair: The two methods' figures, seed by seed, where two are compared. The text then says "not separated" unless
            the interval of their difference excludes zero.

    Returns:
        The claim as it stands in the results. A figure that isn't finite (a run diverged) is None and doesn't hold.
    """
    if direction not in _SIGNS:
        raise ValueError(f"direction={direction!r}: it is 'at_most' or 'at_least'")
    values = np.atleast_1d(np.asarray(measured, float)).tolist()
    figure = statistics.fmean(values)
    finite = math.isfinite(figure)
    if len(values) > 1:
        interval = t_interval(values)
    if pair is not None:
        difference = paired_interval(*pair)
        if difference is None or not (difference[0] > 0 or difference[1] < 0):
            text = f"{text} ({NOT_SEPARATED})"
    holds = figure <= bar if direction == "at_most" else figure >= bar
    figures = (figure if finite else None, list(interval) if interval else None)
    return dict(zip(CLAIM_KEYS, (text, source, bar, direction, *figures, holds and finite), strict=True))


def versions() -> dict[str, str]:
    """Versions of Python, of what the figures rest on where it is installed, and of this package."""
    names = ("torch", "transformers", "accelerate", "peft", "datasets")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **found, "hf_efx": __version__}


def machine() -> dict[str, Any]:
    """What ran: CPU cores that this process may use, the threads torch takes of them, the GPU's name or None, the CPU.

    Results from before the CPU's model and units were recorded have the first three alone.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    model, units = cpu()
    return {"cores": cores, "threads": torch.get_num_threads(), "gpu": gpu, "cpu": model, "cpu units": units}


def cpu() -> tuple[str, str]:
    """The CPU's model, and which of the units for matrices it has, bfloat16's among them: `avx2, amx_bf16`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    pairs = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = pairs.get("flags", pairs.get("Features", "")).split()  # the latter on ARM
    units = [unit for unit in CPU_UNITS if unit in flags]
    return pairs.get("model name") or platform.processor() or platform.machine(), ", ".join(units) or "none known"


def public_command(arguments: Sequence[str] | None = None) -> str:
    """This process's command as others can type it: paths inside the working directory relative, others by name.

    Args:
        arguments: The program and its arguments; None for `sys.argv`.
    """
    shown = []
    for argument in sys.argv if arguments is None else arguments:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        if path.is_absolute():
            value = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)
        shown.append(shlex.quote(f"{option}{equals}{value}"))
    return " ".join(["python", *shown])


def write_results(
    path: str | os.PathLike[str],
    *,
    title: str,
    command: str,
    data: Mapping[str, Any],
    seeds: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, Any]],
    columns: Sequence[Mapping[str, str]] = (),
    headline: str = "",
    plot: str | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes what a study or benchmark measured.

    Args:
        path: `scripts/reproduce/results/<method>.json` or `scripts/benchmarks/results/<method>.json`.
        title: The study in a few words.
        command: The command that made it, see `public_command`.
        data: `name` and `fingerprint` (see `text_data.content_fingerprint`), and what else is worth saying.
        seeds: The seeds.
        rows: One for each configuration and seed: `configuration`, `seed` and raw figures. What isn't finite becomes
            null.
        claims: Made by `claim`.
        columns: Figures that tables show: `key` in the rows, `title`, and `format`, a specification such as `.2f`.
        headline: The result in one sentence; it stands in the README's table.
        plot: File name of the plot, beside `path`.
        settings: Training settings that all rows share.
        notes: Sentences for the card: what didn't work, what wasn't run.

    Returns:
        What stands in the file.

    Raises:
        ValueError: If a part of the form is missing.
    """
    results = {
        "title": title,
        "headline": headline,
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "data": data,
        "seeds": list(seeds),
        "settings": settings or {},
        "columns": list(columns),
        "rows": list(rows),
        "claims": list(claims),
        "plot": plot,
        "notes": list(notes),
    }
    results = _check_results(_plain(results), str(path))
    write_atomically(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return results


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a results file, and raises ValueError naming the file and the part that is missing."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}): run its study again") from error
    return _check_results(results, str(path))


def _check_results(results: dict[str, Any], path: str) -> dict[str, Any]:
    parts = [("results", results, REQUIRED), ("data", results.get("data", {}), ("name", "fingerprint"))]
    parts += [(f"row {i}", row, ("configuration", "seed")) for i, row in enumerate(results.get("rows", []))]
    parts += [(f"claim {i}", one, CLAIM_KEYS) for i, one in enumerate(results.get("claims", []))]
    parts += [(f"column {i}", column, ("key", "title")) for i, column in enumerate(results.get("columns", []))]
    for name, part, keys in parts:
        if missing := [key for key in keys if key not in part]:
            raise ValueError(f"{path}: {name} lacks {', '.join(missing)}")
    return results


def _plain(value: Any) -> Any:
    """JSON's own types: numpy numbers become Python's, tuples lists, what isn't finite None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(inner) for inner in value]
    if type(value).__module__ == "numpy":
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StudyRows:
    """The rows of a running study, kept in `<results>.partial.json` after each one, so that a killed study goes on.

    Args:
        path: The results file; the rows are kept beside it.
        settings: All that the figures depend on beside configuration and seed. Rows made with others are refused.

    Attributes:
        path: Where the rows are kept.

    Raises:
        ValueError: If the rows there were made with other settings, or can't be read.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.path = Path(path).with_suffix(".partial.json")
        self._settings = _plain(settings)
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}
        if not self.path.exists():
            return
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            self._rows = {(row["configuration"], row["seed"]): row for row in kept["rows"]}
            settings_there = kept["settings"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} can't be read ({error!r}): delete it and start the study anew") from error
        if settings_there != self._settings:
            keys = sorted({*settings_there, *self._settings})
            there, here = settings_there.get, self._settings.get
            changed = ", ".join(f"{key}: {there(key)!r}, now {here(key)!r}" for key in keys if there(key) != here(key))
            raise ValueError(
                f"{self.path} holds {len(self._rows)} rows made with other settings ({changed}): run with those "
                "again, or delete the file to start anew"
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in the order in which they were added."""
        return list(self._rows.values())

    def has(self, key: tuple[str, int]) -> bool:
        """Whether the row of this (configuration, seed) is there."""
        return key in self._rows

    def add(self, key: tuple[str, int], row: Mapping[str, Any]) -> None:
        """Keeps the figures of a (configuration, seed), on disk before this returns. One process alone may call it."""
        if key in self._rows:
            raise ValueError(f"{self.path} has a row for {key!r} already: ask has(key) before running it")
        rows = {**self._rows, key: _plain({"configuration": key[0], "seed": key[1], **row})}
        kept = {"settings": self._settings, "rows": list(rows.values())}
        write_atomically(self.path, json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        self._rows = rows

    def finish(self) -> None:
        """Deletes the file, once the results are written."""
        self.path.unlink(missing_ok=True)


def figures(rows: Sequence[Mapping[str, Any]], configuration: str, name: str) -> list[float]:
    """A configuration's figures of one name, by seed, so that two configurations pair. NaN where a run diverged.

    Raises:
        ValueError: If there is no such configuration.
    """
    chosen = sorted((row for row in rows if row["configuration"] == configuration), key=lambda row: row["seed"])
    if not chosen:
        there = ", ".join(dict.fromkeys(row["configuration"] for row in rows))
        raise ValueError(f"no rows of configuration={configuration!r}; there are {there}")
    return [math.nan if row[name] is None else float(row[name]) for row in chosen]


def summary_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One line for each configuration, its figures as mean and 95% interval over seeds.

    Returns:
        Titles, and lines of as many cells, the configuration's name first.
    """
    rows = results["rows"]
    columns = results.get("columns") or [
        {"key": key, "title": key} for key in dict.fromkeys(key for row in rows for key in row)
    ]
    columns = [column for column in columns if column["key"] not in ("configuration", "seed")]
    by_configuration: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_configuration.setdefault(row["configuration"], []).append(row)
    lines = [
        [name, *(_cell([row[c["key"]] for row in group if c["key"] in row], c.get("format", ".4g")) for c in columns)]
        for name, group in by_configuration.items()
    ]
    return ["configuration", *(column["title"] for column in columns)], lines


def _cell(values: list[Any], spec: str) -> str:
    if not values:
        return "\u2013"
    if None in values:
        return f"not finite in {values.count(None)} of {len(values)}"
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return ", ".join(dict.fromkeys(str(value) for value in values))
    if len(set(values)) == 1:
        return format(values[0], spec)
    interval = t_interval(values)
    half = (interval[1] - interval[0]) / 2 if interval else math.nan
    return f"{format(statistics.fmean(values), spec)} \u00b1 {format(half, spec)}"


def claims_table(claims: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles, and a line for each claim: text, source, bar, measured, 95% interval, whether it holds."""
    titles = ["claim", "source", "bar", "measured", "95% interval", "holds"]
    lines = []
    for one in claims:
        measured = "not finite" if one["measured"] is None else f"{one['measured']:.4g}"
        interval = "\u2013" if one["interval"] is None else "{:.4g} to {:.4g}".format(*one["interval"])
        bar = f"{_SIGNS[one['direction']]} {one['bar']:.4g}"
        lines.append([one["claim"], one["source"], bar, measured, interval, "yes" if one["holds"] else "**no**"])
    return titles, lines


def print_results(results: Mapping[str, Any]) -> None:
    """Prints the configurations and the claims to the terminal; few configurations of many figures side by side."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    for name, (titles, lines) in {
        results.get("title", "results"): summary_table(results),
        "claims": claims_table(results["claims"]),
    }.items():
        if not lines:
            continue
        cells = [titles, *([cell.replace("**", "") for cell in line] for line in lines)]
        width = 1 + sum(3 + max(map(len, column)) for column in zip(*cells, strict=True))
        if width > console.width and len(lines) < len(titles):
            cells = list(zip(*cells, strict=True))
        table = Table(*(Column(title, overflow="fold") for title in cells[0]), title=name)  # no figure is cut off
        for line in cells[1:]:
            table.add_row(*line)
        console.print(table)
