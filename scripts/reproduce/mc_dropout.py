"""Translation uncertainty by MC dropout: does a German-English model know Dutch when it sees it?

Follows "Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020,
arXiv 2006.08344, with a small Marian model, interface strings, and Dutch sources of the same English as the shift.

    python scripts/reproduce/mc_dropout.py --data ui_strings_en_de_nl.tsv.gz
    python scripts/reproduce/mc_dropout.py                # number words; every score tells Dutch from German there
    python scripts/reproduce/mc_dropout.py --quick        # a smoke run on them

Trains a model a seed, two beside each other, one thread each. A killed study goes on where it stopped. Results:
scripts/reproduce/results/mc_dropout.json and mc_dropout.png.
"""

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mc_dropout_plots import plot
from mc_dropout_runs import ANSWER_SCORES, MAIN, SWEEPS, run, study_pairs
from study_jobs import Job, run_all

HERE = Path(__file__).parent
STEPS = 1800  # of a model on strings
KEPT = (0.1, 0.25, 0.5, 0.75, 1.0)
LENGTHS = ((1, 5), (6, 8), (9, 14), (15, 10**9))  # English words
BLEUVAR = f"bleuvar, N = {MAIN}"
DEFERRED = 0.1
COLUMNS = (
    ("auroc", "AUROC for Dutch", ".3f"),
    ("aupr", "AUPR", ".3f"),
    ("fpr95", "FPR95", ".3f"),
    ("kept_10", "BLEU of the kept 10%", ".1f"),
    ("kept_25", "25%", ".1f"),
    ("kept_50", "50%", ".1f"),
    ("kept_100", "all", ".1f"),
    ("prr", "PRR", ".3f"),
    ("prr_german", "PRR, German alone", ".3f"),
    ("kept_words", "English words, kept half", ".1f"),
    ("stratified_50", "BLEU, half of each length", ".1f"),
)


class Study:
    """What was measured, seed by seed, of the same sources: German ones first, then Dutch ones."""

    def __init__(self, test: Any, rows: Mapping[int, Mapping[str, Any]]) -> None:
        from hf_efx.mc_dropout import sentence_chrf

        self.rows = rows
        self.references = [*test["target"], *test["target"]]
        self.words = np.array([len(text.split()) for text in self.references])
        self.shifted = np.arange(2 * len(test)) >= len(test)
        self.quality = {seed: sentence_chrf(row["answers"], self.references) for seed, row in rows.items()}

    def scores(self, seed: int) -> dict[str, np.ndarray]:
        """All scores of a seed by their names in the table."""
        row = self.rows[seed]
        found = {f"bleuvar, N = {n}": values for n, values in row["bleuvar"].items()}
        found |= {name: values for name, values in row["scores"].items() if name != "bleuvar"}
        return {name: np.asarray(values, float) for name, values in found.items()}

    def figures(self, seed: int, name: str, values: np.ndarray) -> dict[str, float]:
        """One line of the table."""
        from hf_efx.mc_dropout import detection_report, prediction_rejection_ratio, retention_curves

        report = detection_report(values, self.shifted, draws=0)
        answers, tie = self.rows[seed]["answers"], self.scores(seed)["beam_score"]
        curve = retention_curves(
            {name: values, "tie": tie}, answers, self.references, tie_break="tie", fractions=KEPT, draws=0
        )[name]
        quality, german = self.quality[seed], ~self.shifted
        ratio = prediction_rejection_ratio(values, quality, tie_break=tie, draws=0).ratio
        inside = prediction_rejection_ratio(values[german], quality[german], tie_break=tie[german], draws=0).ratio
        order = np.lexsort((tie, values))
        half = order[: len(order) // 2]
        return {
            **{metric: getattr(report, metric) for metric in ("auroc", "aupr", "fpr95")},
            **{f"kept_{100 * share:g}": bleu for share, bleu in curve.points},
            "prr": ratio,
            "prr_german": inside,
            "kept_words": float(self.words[half].mean()),
            "stratified_50": self._stratified(seed, order),
        }

    def _stratified(self, seed: int, order: np.ndarray) -> float:
        """BLEU of the surest half of each length class: what a score is worth beside its liking for short ones."""
        import sacrebleu

        kept: list[int] = []
        for low, high in LENGTHS:
            rows = order[(self.words[order] >= low) & (self.words[order] <= high)]
            kept += rows[: len(rows) // 2].tolist()
        answers = [self.rows[seed]["answers"][i] for i in kept]
        return sacrebleu.corpus_bleu(answers, [[self.references[i] for i in kept]]).score

    def by_length(self, seed: int) -> list[dict[str, Any]]:
        """BLEUVar, beam score and sequence probability among sources of one length class."""
        from hf_efx.mc_dropout import detection_report

        lines, found = [], self.scores(seed)
        for low, high in LENGTHS:
            rows = (self.words >= low) & (self.words <= high)
            if len(set(self.shifted[rows])) < 2:
                continue
            words = f"{low} to {high} words" if high < 10**9 else f"{low} words or more"
            for name in (BLEUVAR, *ANSWER_SCORES):
                report = detection_report(found[name][rows], self.shifted[rows], draws=0)
                figures = {metric: getattr(report, metric) for metric in ("auroc", "aupr", "fpr95")}
                lines.append({"configuration": f"{words}: {name}", "seed": seed, "sources": report.sources, **figures})
        return lines

    def table(self) -> list[dict[str, Any]]:
        """A line for each score, length class and seed."""
        lines = [
            {"configuration": name, "seed": seed, **self.figures(seed, name, values)}
            for seed in self.rows
            for name, values in self.scores(seed).items()
        ]
        return lines + [line for seed in self.rows for line in self.by_length(seed)]

    def bleu(self, seed: int) -> dict[str, float]:
        """Corpus BLEU of German and of Dutch, and what a threshold from validation data defers."""
        import sacrebleu

        from hf_efx.mc_dropout import choose_threshold

        row, half = self.rows[seed], len(self.references) // 2
        known = [score for score in row["validation"] if np.isfinite(score)]
        deferred = choose_threshold(known, DEFERRED).deferred(self.scores(seed)[BLEUVAR])
        parts = {"german": slice(0, half), "dutch": slice(half, None)}
        found = {
            f"bleu_{name}": sacrebleu.corpus_bleu(row["answers"][rows], [self.references[rows]]).score
            for name, rows in parts.items()
        }
        return {**found, **{f"deferred_{name}": float(deferred[rows].mean()) for name, rows in parts.items()}}


def sweep_lines(study: Study, sweeps: Mapping[str, Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A line for each other way of sampling."""
    from hf_efx.mc_dropout import detection_report

    lines = []
    for name, row in sweeps.items():
        count = len(row["bleuvar"]) // 2
        report = detection_report(row["bleuvar"], np.arange(2 * count) >= count, draws=0)
        figures = {metric: getattr(report, metric) for metric in ("auroc", "aupr", "fpr95")}
        figures["mean_german"], figures["seconds"] = float(np.mean(row["bleuvar"][:count])), row["seconds"]
        lines.append({"configuration": f"half of the sources: {name}", "seed": seed, **figures})
    return lines


def make_claims(study: Study, table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars."""
    from hf_efx.core.results.evidence import NOT_SEPARATED, claim, figures
    from hf_efx.mc_dropout import detection_difference

    seeds = list(study.rows)
    text = f"AUROC of BLEUVar (N = {MAIN}) for Dutch sources of the same English"
    claims = [claim(text, source="ours", bar=0.95, direction="at_least", measured=figures(table, BLEUVAR, "auroc"))]
    stacked = {name: np.stack([study.scores(seed)[name] for seed in seeds]) for name in (BLEUVAR, *ANSWER_SCORES)}
    for rival in ANSWER_SCORES:
        value, interval = detection_difference(stacked[BLEUVAR], stacked[rival], study.shifted)["auroc"]
        text = f"its AUROC less that of the {rival.replace('_', ' ')}, mean over seeds, bootstrap over sources"
        text += f" ({NOT_SEPARATED})" if interval[0] <= 0 <= interval[1] else ""
        claims.append(claim(text, source="ours", bar=0.0, direction="at_least", measured=value, interval=interval))
    kept = {share: figures(table, BLEUVAR, f"kept_{share}") for share in (25, 50, 100)}
    for text, bar, above, below in (
        ("corpus BLEU of the half that BLEUVar keeps over that of all sources", 1.5, kept[50], kept[100]),
        ("corpus BLEU of the quarter that it keeps over that of the half", 1.0, kept[25], kept[50]),
    ):
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        claims.append(claim(text, source="ours", bar=bar, direction="at_least", measured=ratios))
    for key, what in (
        ("kept_50", "BLEU of the kept half"),
        ("stratified_50", "BLEU of the kept half of each length class"),
        ("prr_german", "prediction-rejection ratio (chrF) on German alone"),
    ):
        ours, theirs = (figures(table, name, key) for name in (BLEUVAR, "sequence_probability"))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        text = f"{what}: BLEUVar less sequence probability"
        claims.append(
            claim(text, source="ours", bar=0.0, direction="at_least", measured=differences, pair=(ours, theirs))
        )
    return claims


def notes(study: Study, sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the claims leave out."""
    found = [study.bleu(seed) for seed in study.rows]
    mean = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
    cut = statistics.fmean(sum(map(bool, row["notes"])) / len(row["notes"]) for row in study.rows.values())
    repeated = min(row["repeated"] for row in study.rows.values())
    return [
        f"Corpus BLEU {mean['bleu_german']:.1f} on German, {mean['bleu_dutch']:.1f} on Dutch (mean over seeds, beam "
        f"4); samples are greedy.",
        f"A threshold that defers {DEFERRED:.0%} of validation sources defers {mean['deferred_german']:.1%} of the "
        f"German and {mean['deferred_dutch']:.1%} of the Dutch test sources.",
        f"The first {MAIN} samples of the runs with the most samples are those of a run of {MAIN}, text by text, for "
        f"{repeated:.1%} of the sources at least.",
        f"{cut:.1%} of the answers reached the limit of their length or had their source cut.",
        "PRR is the prediction-rejection ratio over sentence chrF: BLEU of a corpus has no oracle order. Ties of a "
        "score are broken by the beam score.",
        *(f"BLEUVar where {line['configuration']}: mean on German {line['mean_german']:.3f}." for line in sweeps),
    ]


def examples(study: Study, test: Any, seed: int, count: int = 3) -> dict[str, list[dict[str, str]]]:
    """Sources that were deferred rightly (a bad translation) and wrongly (a good one), and kept wrongly."""
    values, quality = study.scores(seed)[BLEUVAR], study.quality[seed]
    sources = [*test["source"], *test["nl"]]
    above = values > np.quantile(values[~study.shifted], 1 - DEFERRED)
    kinds = {
        "deferred rightly": (above & (quality < 0.3), -values),
        "deferred wrongly": (above & (quality > 0.8), -values),
        "kept wrongly": (~above & (quality < 0.3), values),
    }
    return {
        kind: [
            {"source": sources[i], "translation": study.rows[seed]["answers"][i], "reference": study.references[i]}
            for i in np.argsort(order, kind="stable")
            if rows[i]
        ][:count]
        for kind, (rows, order) in kinds.items()
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="table of strings with columns de, en, nl (default: number words)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"of training (default: {STEPS}; number words: 1,200)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--models", type=Path, help="folder that keeps the models (default: deleted in the end)")
    parser.add_argument("--output", type=Path, help="results file (default: results/mc_dropout.json here)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, few steps, written to runs/")
    options = parser.parse_args(argv)
    options.steps = options.steps or (STEPS if options.data else 1200)
    options.limit = None
    if options.quick:
        options.seeds, options.steps, options.limit, options.workers = options.seeds[:1], 150, 40, 1
    return options


def training(options: argparse.Namespace) -> list[str]:
    """The command line of `scripts/train_marian.py` that makes a model."""
    from hf_efx.core.results.evidence import machine

    given = ["--dataset", options.data, "--source_column", "de", "--target_column", "en"] if options.data else []
    more: dict[str, Any] = {"max_eval_examples": 100}
    if options.data:
        more = {"warmup_steps": 300, "max_eval_examples": 400}
        if "bf16" in machine()["cpu units"]:
            more["bf16"] = "true"
    more |= {"max_steps": options.steps, "save_steps": 100, "save_total_limit": 2, "report_to": "none"}
    flags = ["--use_cpu", "--disable_tqdm", "true"]
    return [*given, *(word for key, value in more.items() for word in (f"--{key}", str(value))), *flags]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study."""
    from hf_efx.core.data.text_data import content_fingerprint, source_name
    from hf_efx.core.results.evidence import StudyRows, print_results, public_command, write_results
    from hf_efx.mc_dropout.bleu import bleu_signature

    options = parse(argv)
    path = options.output or (Path("runs/reproduce") if options.quick else HERE / "results") / "mc_dropout.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    models = options.models or path.with_suffix(".models")
    test, _ = study_pairs(options.data)
    if options.limit:
        test = test.select(range(options.limit))
    name = source_name(options.data) if options.data else "number words"
    texts = test.map(lambda row: {"text": "\t".join(row[key] for key in ("source", "target", "nl"))})
    data = {"name": name, "fingerprint": content_fingerprint(texts), "pairs": len(test)}
    arguments = training(options)
    settings = {"training": " ".join(a if a != options.data else name for a in arguments), "data": data}
    settings |= {
        "bleu": bleu_signature(),
        "sources": f"{len(test)} German ones and the Dutch ones of the same English",
    }
    rows = StudyRows(path, settings)
    common = {"models": str(models), "training": arguments, "data": options.data, "limit": options.limit}
    first = options.seeds[0]
    jobs = [Job(kind, seed, 10) for seed in options.seeds for kind in ("train: ", "scores: ")]
    for kind in ("train: ", "scores: "):
        run_all(run, [job for job in jobs if job.configuration == kind], rows, options.workers, **common)
    names = list(SWEEPS)[:2] if options.quick else list(SWEEPS)
    run_all(run, [Job(f"sweep: {name}", first, 5) for name in names], rows, options.workers, **common)
    by_key = {(row["configuration"], row["seed"]): row for row in rows.rows}
    study = Study(test, {seed: by_key["scores: ", seed] for seed in options.seeds})
    table = study.table()
    sweeps = sweep_lines(study, {name: by_key[f"sweep: {name}", first] for name in names}, first)
    claims = make_claims(study, table)
    plot(study, table, sweeps, path.with_suffix(".png"))
    results = write_results(
        path,
        title="Translation uncertainty: Dutch shown to a German-English model",
        headline=headline(table, claims),
        command=public_command(),
        data=data,
        seeds=options.seeds,
        rows=[*table, *sweeps],
        claims=claims,
        columns=[{"key": key, "title": title, "format": spec} for key, title, spec in COLUMNS],
        plot=path.with_suffix(".png").name,
        settings=settings,
        notes=notes(study, sweeps),
    )
    print_results(results)
    for kind, lines in examples(study, test, first).items():
        print(
            f"{kind}:", *(f"  {line['source']!r} -> {line['translation']!r} ({line['reference']!r})" for line in lines)
        )
    rows.finish()
    if options.models is None:
        shutil.rmtree(models, ignore_errors=True)


def headline(table: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]]) -> str:
    """The result in one sentence."""
    from hf_efx.core.results.evidence import figures

    auroc = {n: statistics.fmean(figures(table, n, "auroc")) for n in (BLEUVAR, *ANSWER_SCORES)}
    ratio = next(one["measured"] for one in claims if "half that BLEUVar keeps" in one["claim"])
    return (
        f"BLEUVar tells Dutch from German sources with an AUROC of {auroc[BLEUVAR]:.3f} (beam score "
        f"{auroc['beam_score']:.3f}, sequence probability {auroc['sequence_probability']:.3f}); the half that it "
        f"keeps has {ratio:.1f} x the BLEU of all"
    )


if __name__ == "__main__":
    main()
