"""Cards: of a checkpoint, with its results in `model-index`, and of a published study or benchmark."""

import dataclasses
import math
import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_efx.core.files import write_atomically
from hf_efx.core.results.evidence import claims_table, summary_table, versions

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# What the Hub takes as an identifier of a task, a data set or a metric.
_IDENTIFIER, _FOREIGN = re.compile(r"[\w.-]+(/[\w.-]+)?"), re.compile(r"[^\w.-]+")

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class MethodRow(Protocol):
    """What a card tells of a method: see `hf_efx.registry.Method`."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def paper(self) -> str: ...
    @property
    def arxiv(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def citation(self) -> str: ...


def eval_results(figures: Mapping[str, float], **data: Any) -> list[EvalResult]:
    """Figures as results for a card, each under its own name as the metric's type.

    Args:
        figures: By name.
        **data: The other fields of `EvalResult`: task, data set and what is known of it.
    """
    return [
        EvalResult(metric_type=name, metric_name=name.replace("_", " "), metric_value=value, **data)
        for name, value in figures.items()
    ]


def write_model_card(
    directory: str | os.PathLike[str],
    *,
    model_name: str,
    methods: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    description: str = "",
    auto_class: str = "AutoModelForCausalLM",
    repo_id: str | None = None,
    needs_hf_efx: bool = True,
    configuration: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    comparison: Table | None = None,
    plot: str | None = None,
    citations: Sequence[str] = (),
    tags: Sequence[str] = (),
    **metadata: Any,
) -> Path:
    """Writes `README.md` beside a checkpoint.

    Args:
        directory: The checkpoint's folder.
        model_name: Its name, in the title and in `model-index`.
        methods: Names of the methods in it, which become tags beside `hf_efx`.
        results: Its figures, for `model-index` and a table. A value that isn't finite is written as text; an
            identifier that the Hub wouldn't take, such as the metric type "ndcg@10", is made one, and kept as a name.
        description: What the model is, in Markdown.
        auto_class: The transformers class that loads it.
        repo_id: Where it is loaded from; None for `model_name`.
        needs_hf_efx: Whether loading needs `import hf_efx`.
        configuration: The methods' settings; nested mappings become dotted names.
        training: How it was trained, likewise.
        comparison: A table of other models beside it: titles and lines.
        plot: File name of a plot in `directory`.
        citations: BibTeX entries, from `hf_efx.registry`.
        tags: Further tags.
        **metadata: Other fields of `huggingface_hub.ModelCardData`: `license`, `base_model`, `datasets`, `language`,
            `pipeline_tag`.

    Returns:
        The card's path. A card that stood there is replaced, whole or not at all.

    Raises:
        ValueError: If the plot isn't in `directory`.
    """
    directory = Path(directory)
    if plot is not None and (Path(plot).is_absolute() or not (directory / plot).is_file()):
        raise ValueError(f"plot={plot!r}: name a file inside {str(directory)!r}, the card's own folder")
    results = [_checked(result) for result in results]
    data = ModelCardData(
        model_name=model_name,
        eval_results=results or None,
        library_name="transformers",
        tags=list(dict.fromkeys(["hf_efx", *methods, *tags])),
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        **metadata,
    )
    parts = {"model_name": model_name, "description": description, "auto_class": auto_class, "plot": plot}
    body = TEMPLATES.get_template("model_card.md.jinja").render(
        **parts,
        repo_id=repo_id or model_name,
        needs_hf_efx=needs_hf_efx,
        results=markdown_table(*_results_table(results)) if results else "",
        comparison=markdown_table(*comparison) if comparison else "",
        configuration=settings_table(configuration),
        training=settings_table(training),
        versions=settings_table(versions()),
        citations=citations,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")  # reads it back: what can't be read raises here
    write_atomically(directory / "README.md", str(card))
    return directory / "README.md"


def render_result_card(results: Mapping[str, Any], *, method: MethodRow, source: str) -> str:
    """Renders the card of one published result, which stands in `model_cards/`.

    Args:
        results: What `evidence.read_results` gives.
        method: The method's row in `hf_efx.registry`.
        source: The results file, relative to the repository's root.

    Returns:
        Markdown: figures over seeds, plot, claims, notes, and how it was run.
    """
    machine, data = results["machine"], results["data"]
    plot = results.get("plot")
    run = {
        "seeds": ", ".join(map(str, results["seeds"])),
        "data": data["name"],
        "data fingerprint": data["fingerprint"],
        **{f"data {key}": value for key, value in data.items() if key not in ("name", "fingerprint")},
        "machine": f"{machine['cores']} CPU cores, GPU: {machine['gpu'] or 'none'}",
        **{key: value for key, value in machine.items() if key not in ("cores", "gpu")},
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        **results.get("settings", {}),
    }
    return TEMPLATES.get_template("result_card.md.jinja").render(
        results={"headline": "", "notes": [], **results},
        title=results.get("title") or method.title,
        method=method,
        source=source,
        figures=markdown_table(*summary_table(results)),
        plot=f"../{posixpath.join(posixpath.dirname(source), plot)}" if plot else None,
        claims=markdown_table(*claims_table(results["claims"])) if results["claims"] else "",
        held=sum(bool(claim["holds"]) for claim in results["claims"]),
        run=settings_table(run),
    )


def markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a line break at its end. Cells may hold Markdown; pipes and line breaks are escaped."""
    rows = [list(titles), ["---"] * len(titles), *lines]
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def settings_table(settings: Mapping[str, Any] | None) -> str:
    """Nested settings as a Markdown table of two columns; empty where there are none."""
    if not settings:
        return ""
    return markdown_table(("setting", "value"), [(name, f"`{value}`") for name, value in _flat(settings)])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        inside = isinstance(value, Mapping) and value
        pairs += _flat(value, f"{prefix}{name}.") if inside else [(f"{prefix}{name}", value)]
    return pairs


def _results_table(results: Sequence[EvalResult]) -> Table:
    lines = []
    for result in results:
        split = f" ({result.dataset_split})" if result.dataset_split else ""
        value = f"{result.metric_value:.4g}" if isinstance(result.metric_value, float) else str(result.metric_value)
        lines.append((result.metric_name or result.metric_type, f"{result.dataset_name}{split}", value))
    return ("metric", "data", "value"), lines


def _checked(result: EvalResult) -> EvalResult:
    """A result as YAML and the Hub take it: identifiers without other signs, numpy and torch scalars as Python's."""
    changed: dict[str, Any] = {}
    for kind in ("task", "dataset", "metric"):
        given = str(getattr(result, f"{kind}_type"))
        if not _IDENTIFIER.fullmatch(given):
            changed[f"{kind}_type"] = _FOREIGN.sub("_", given).strip("_") or kind
            changed[f"{kind}_name"] = getattr(result, f"{kind}_name") or given
    value = result.metric_value
    value = value.tolist() if callable(getattr(value, "tolist", None)) else value
    if not isinstance(value, int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        value = str(value)
    return dataclasses.replace(result, metric_value=value, **changed)
