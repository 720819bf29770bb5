"""Generates cards and tables from the committed results of studies and benchmarks.

    python scripts/render_results.py            # writes what has drifted
    python scripts/render_results.py --check    # names what has drifted, and exits with 1

From `scripts/reproduce/results/<method>.json` (studies), `scripts/benchmarks/results/<method>.json` and
`scripts/benchmarks/results/gpu/<method>.json` come `model_cards/<method>-study.md`, `-benchmark.md`, `-gpu.md` and the
text between `<!-- begin generated: NAME -->` and `<!-- end generated -->`: `study` and `benchmark` (the GPU's table
below the CPU's) in a method's page, `methods` in the README. `options` in a method's page comes from the fields of its
config and arguments.
"""

import argparse
import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_efx.core.files import write_atomically
from hf_efx.core.results.card import markdown_table, render_result_card
from hf_efx.core.results.evidence import NOT_SEPARATED, claims_table, read_results, summary_table
from hf_efx.core.training.arguments import describe_options
from hf_efx.registry import METHODS, Figure, Method

KINDS = {
    "study": "scripts/reproduce/results",
    "benchmark": "scripts/benchmarks/results",
    "gpu": "scripts/benchmarks/results/gpu",  # scripts/benchmarks/on_gpu.sh
}
SECTION = re.compile(r"(<!-- begin generated: ([^>]*?) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)
BEGIN = re.compile(r"<!-- begin generated: .*? -->")

EMPTY = "\u2013"

Results = dict[tuple[str, str], dict]


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the generated files; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something has drifted")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    options = parser.parse_args(arguments)
    drifted = drift(options.root, METHODS)
    for path, text in drifted.items():
        print(f"{'drifted' if options.check else 'written'}: {path.relative_to(options.root)}")
        if options.check:
            continue
        if text is None:
            path.unlink()
        else:
            write_atomically(path, text)
    if drifted and options.check:
        print("run `python scripts/render_results.py` and commit what it writes")
    return int(options.check and bool(drifted))


def drift(root: Path, methods: Mapping[str, Method]) -> dict[Path, str | None]:
    """The files that differ from what the results give: path -> text as it should be, None for a card without results.

    Raises:
        ValueError: If a results file is incomplete or of no method in the registry, or a marked section is unknown or
            isn't closed.
    """
    results = _read_all(root, methods)
    cards = [path for kind in KINDS for path in (root / "model_cards").glob(f"*-{kind}.md")]
    wanted: dict[Path, str | None] = dict.fromkeys(sorted(cards))
    for (name, kind), one in results.items():
        source = f"{KINDS[kind]}/{name}.json"
        wanted[root / f"model_cards/{name}-{kind}.md"] = render_result_card(one, method=methods[name], source=source)
    readme = root / "README.md"
    if readme.exists():
        wanted[readme] = _filled(readme, {"methods": _methods_table(root, methods, results)})
    for name in methods:
        page = root / "hf_efx" / name / "README.md"
        if page.exists():
            sections = {kind: _measured(results.get((name, kind)), name, kind) for kind in KINDS}
            if (name, "gpu") in results:  # beside the CPU's table
                sections["benchmark"] += f"\n\n{sections['gpu']}"
            wanted[page] = _filled(page, {**sections, "options": _options(METHODS[name].options)})
    return {path: text for path, text in wanted.items() if text != _text(path)}


def _read_all(root: Path, methods: Mapping[str, Method]) -> Results:
    results: Results = {}
    for kind, folder in KINDS.items():
        for path in sorted((root / folder).glob("*.json")):
            if path.name.endswith(".partial.json"):  # a study that runs or was killed
                continue
            if path.stem not in methods:
                raise ValueError(f"{path} is of no method in hf_efx.registry: {', '.join(methods)}")
            one = results[path.stem, kind] = read_results(path)
            if (plot := one.get("plot")) and not (path.parent / plot).is_file():
                raise ValueError(f"{path} names plot={plot!r}, which isn't beside it: run its study again")
    return results


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _filled(path: Path, sections: Mapping[str, str]) -> str:
    """The file's text with its marked sections generated anew."""

    def fill(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in sections:
            raise ValueError(f"{path}: unknown generated section {name!r}; there are {', '.join(sections)}")
        return f"{begin}{sections[name]}\n{end}"

    text = path.read_text(encoding="utf-8")
    if len(BEGIN.findall(text)) != len(SECTION.findall(text)):
        raise ValueError(f"{path}: a generated section isn't closed by '<!-- end generated -->'")
    return SECTION.sub(fill, text)


def _methods_table(root: Path, methods: Mapping[str, Method], results: Results) -> str:
    lines = []
    for name, method in methods.items():
        page = f"hf_efx/{name}/"
        title = f"[{method.title}]({page})" if (root / page).is_dir() else method.title
        paper = f"[{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
        measured = [_figure(name, figure, results) for figure in (method.quality, method.cost)]
        lines.append((title, paper, *(measured if method.program else ("planned", EMPTY))))
    return markdown_table(("method", "paper (arXiv)", "quality, measured", "cost, measured"), lines)


def _figure(name: str, figure: Figure | None, results: Results) -> str:
    """A claim's measured figure in the registry's words, with a link to its card.

    Raises:
        ValueError: If the method's results have no such claim.
    """
    if figure is None or (name, figure.kind) not in results:
        return EMPTY
    claims = {one["claim"].removesuffix(f" ({NOT_SEPARATED})"): one for one in results[name, figure.kind]["claims"]}
    if figure.claim not in claims:
        raise ValueError(
            f"hf_efx.registry: {name} names the claim {figure.claim!r}, which {KINDS[figure.kind]}/{name}.json lacks"
        )
    measured = claims[figure.claim]["measured"]
    words = "not finite" if measured is None else figure.words.format(figure.scale * measured)
    return f"[{words}](model_cards/{name}-{figure.kind}.md)"


def _options(paths: Sequence[str]) -> str:
    parts = []
    for path in paths:
        module, _, name = path.rpartition(".")
        options = getattr(importlib.import_module(module), name)
        foreign = {f.name for base in options.__mro__ if base.__module__.startswith("peft.") for f in _fields(base)}
        lines = [
            (f"`{o.name}`", f"`{o.default!r}`", o.help) for o in describe_options(options) if o.name not in foreign
        ]
        parts.append(f"`{name}`\n\n{markdown_table(('option', 'default', 'what it does and trades'), lines)}")
    return "\n\n".join(parts)


def _fields(kind: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _measured(results: dict | None, name: str, kind: str) -> str:
    if results is None:
        return "Not measured yet."
    machine, data = results["machine"], results["data"]
    seeds = ", ".join(map(str, results["seeds"]))
    parts = [
        f"`{results['command']}` on {data['name']}; seeds {seeds}; {machine['cores']} CPU cores, GPU: "
        f"{machine['gpu'] or 'none'}. Everything else is on [the card](../../model_cards/{name}-{kind}.md).",
        markdown_table(*summary_table(results)),
    ]
    if results["claims"]:
        parts.append(markdown_table(*claims_table(results["claims"])))
    return "\n\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
