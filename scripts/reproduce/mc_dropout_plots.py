"""The plot of the study of translation uncertainty."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mc_dropout_runs import ANSWER_SCORES, MAIN, SAMPLES, TOKEN_SCORES

SHOWN = (f"bleuvar, N = {MAIN}", *ANSWER_SCORES)


def plot(study: Any, table: Sequence[Mapping[str, Any]], sweeps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """BLEU of what is kept, AUROC by score, by number of samples, by length, and BLEUVar's distributions.

    Args:
        study: The scores by seed.
        table: A line for each score and seed.
        sweeps: A line for each other way of sampling.
        path: Of the PNG.
    """
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    _retention(axes[0][0], study)
    _bars(axes[0][1], table, [*SHOWN, "lexical_similarity", "chrf", *TOKEN_SCORES], "AUROC for Dutch by score")
    _numbers(axes[0][2], table)
    _distributions(axes[1][0], study)
    lengths = sorted({line["configuration"].partition(": ")[0] for line in table if "sources" in line}, key=_first)
    _lengths(axes[1][1], table, lengths)
    _bars(axes[1][2], sweeps, [line["configuration"] for line in sweeps], "half of the sources, one seed")
    save_figure(figure, path, dpi=80)


def _first(text: str) -> int:
    return int(text.split()[0])


def _mean(table: Sequence[Mapping[str, Any]], name: str, key: str = "auroc") -> tuple[float, ...]:
    """Mean over seeds, the lowest and the highest."""
    values = [line[key] for line in table if line["configuration"] == name]
    return (statistics.fmean(values), min(values), max(values)) if values else (np.nan,) * 3


def _retention(axis: Any, study: Any) -> None:
    from hf_efx.mc_dropout import retention_curves

    for i, name in enumerate(SHOWN):
        for seed, row in study.rows.items():
            found = study.scores(seed)
            scores = {name: found[name], "tie": found["beam_score"]}
            curve = retention_curves(scores, row["answers"], study.references, tie_break="tie", draws=0)[name]
            label = name if seed == next(iter(study.rows)) else None
            axis.plot(curve.fractions, curve.values, color=f"C{i}", alpha=0.8, label=label)
    axis.set(xlabel="share kept, the surest first", ylabel="corpus BLEU", title="German and Dutch sources, by seed")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _bars(axis: Any, table: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> None:
    for y, name in enumerate(names[::-1]):
        mean, low, high = _mean(table, name)
        axis.barh(y, mean, color="C0" if "bleuvar" in name or ":" in name else "C7", alpha=0.8)
        axis.plot([low, high], [y, y], color="black")
        axis.text(mean, y, f" {mean:.3f}", va="center", fontsize="small")
    axis.set_yticks(range(len(names)), [name.partition(": ")[2] or name for name in names[::-1]], fontsize="small")
    axis.set(xlim=(0.5, 1.05), xlabel="AUROC", title=title)


def _numbers(axis: Any, table: Sequence[Mapping[str, Any]]) -> None:
    numbers = [n for n in SAMPLES if not np.isnan(_mean(table, f"bleuvar, N = {n}")[0])]
    for key, label in (("auroc", "AUROC"), ("fpr95", "FPR95")):
        axis.plot(numbers, [_mean(table, f"bleuvar, N = {n}", key)[0] for n in numbers], "o-", label=label)
    axis.set(xlabel="samples", title="BLEUVar by the number of samples")
    axis.grid(alpha=0.3)
    axis.legend()


def _distributions(axis: Any, study: Any) -> None:
    values = np.concatenate([study.scores(seed)[SHOWN[0]] for seed in study.rows])
    shifted = np.tile(study.shifted, len(study.rows))
    for kind, name in ((~shifted, "German"), (shifted, "Dutch")):
        axis.hist(values[kind], bins=np.linspace(0, 1, 41), alpha=0.6, label=name, density=True)
    axis.set(xlabel="BLEUVar", ylabel="density", title=f"BLEUVar of {MAIN} samples")
    axis.legend()


def _lengths(axis: Any, table: Sequence[Mapping[str, Any]], lengths: Sequence[str]) -> None:
    width = 0.8 / len(SHOWN)
    for i, name in enumerate(SHOWN):
        means = [_mean(table, f"{length}: {name}")[0] for length in lengths]
        axis.bar(np.arange(len(lengths)) + i * width, means, width, color=f"C{i}", label=name)
    axis.set_xticks(np.arange(len(lengths)) + width, lengths, fontsize="small")
    axis.set(ylim=(0.5, 1.0), ylabel="AUROC", title="by length of the English")
    axis.legend(fontsize="small", loc="lower right")
