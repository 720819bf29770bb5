"""The program `hf-efx mc-dropout`: translates a file or data set and says of each text how uncertain the model is.

    hf-efx mc-dropout --model Helsinki-NLP/opus-mt-de-en --dataset letters.txt
    hf-efx mc-dropout --model runs/marian --dataset pairs.tsv --source_column de --target_column en --defer_share 0.1
    echo "Wo ist der Bahnhof?" | python scripts/translate_with_uncertainty.py --model runs/marian --json

"Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020, arXiv
2006.08344.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.data.text_data import source_name
from hf_efx.core.data.text_files import load_rows
from hf_efx.core.data.text_pairs import NUMBER_WORDS, load_pairs
from hf_efx.core.results.curves import plot_curves
from hf_efx.core.results.evidence import print_results, write_results
from hf_efx.mc_dropout.options import TranslationOptions
from hf_efx.mc_dropout.retention import retention_curves
from hf_efx.mc_dropout.threshold import saved_threshold
from hf_efx.mc_dropout.translate import EMPTY
from hf_efx.mc_dropout.translation_table import JSON_LINES, score_translations
from hf_efx.programs.frame import not_the_input, run_program
from hf_efx.programs.model_options import checkpoint_config, computing_device

RESULTS, PLOT = "results.json", "retention.png"
STDIN, SHOWN = "-", 20  # rows of a file that are shown


@dataclass
class ScoringOptions:
    """What is translated by which model, what is deferred, and where it is written."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A model that translates: a folder or a name on the Hub.", "aliases": ["--model"]},
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "What is translated: .txt (a line each), .tsv, .csv, .json, .jsonl, .parquet, a folder of such "
            "files, a data set on the Hub (name or name:config), or - for the lines of standard input. Without it: "
            "number words.",
            "aliases": ["--data"],
        },
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Where a table holds the sources; without it 'source', of plain text 'text'."}
    )
    target_column: str | None = field(
        default=None, metadata={"help": "Where it holds translations: with them BLEU and what deferring gains."}
    )
    split: str | None = field(default=None, metadata={"help": "Of the data; without it all splits together."})
    max_examples: int | None = field(
        default=None, metadata={"help": "Sources at most: fewer are faster, and tell less."}
    )
    defer_above: float | None = field(
        default=None,
        metadata={"help": "Defer scores above this. Without it: the model's own uncertainty.json, if there is one."},
    )
    defer_share: float | None = field(
        default=None,
        metadata={
            "help": "Choose the threshold on this data so that this share is deferred, and write it into the output "
            "folder as uncertainty.json: beside the model's files, pipeline and program take it from there."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Sources at a time: more are faster and take more memory."})
    device: str | None = field(
        default=None,
        metadata={"help": "Where to compute, such as 'cpu'. Without it: the accelerator, if there is one."},
    )
    json: bool = field(default=False, metadata={"help": "Print a JSON line for each source in place of the table."})
    output_dir: str | None = field(
        default="runs/mc_dropout",
        metadata={"help": "Folder of translations.arrow, translations.jsonl and results; a cut run goes on there."},
    )
    plot: bool = field(
        default=True, metadata={"help": f"With translations: draw BLEU over the share kept into {PLOT}."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is missing: name a model with --model.")
        if self.defer_above is not None and self.defer_share is not None:
            raise ValueError("defer_above and defer_share both say what is deferred: give one of them.")
        if self.defer_share is not None and not 0 < self.defer_share < 1:
            raise ValueError(f"defer_share={self.defer_share}: expected a share above 0 and below 1.")
        for name in ("batch_size", "max_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more.")
        computing_device(self.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, as `run_program` says."""
    return run_program(
        _program, argv, prog="hf-efx mc-dropout", description=__doc__, options=(ScoringOptions, TranslationOptions)
    )


def translate_main(argv: Sequence[str] | None = None) -> int:
    """Runs it on the lines of standard input unless data are named, and writes nothing unless a folder is named."""
    return run_program(
        _program,
        argv,
        prog="translate_with_uncertainty.py",
        description=__doc__,
        options=(ScoringOptions, TranslationOptions),
        dataset=STDIN,
        output_dir=None,
        plot=False,
    )


def _program(command: str, options: ScoringOptions, translation: TranslationOptions) -> None:
    name = str(options.model_name_or_path)
    kind: Any = AutoModelForSeq2SeqLM if checkpoint_config(name).is_encoder_decoder else AutoModelForCausalLM
    data = _data(options)
    model = kind.from_pretrained(name).to(computing_device(options.device))
    tokenizer = AutoTokenizer.from_pretrained(name)
    threshold: Any = options.defer_above
    if threshold is None and options.defer_share is None:
        threshold = saved_threshold(model)
    folder = Path(options.output_dir) if options.output_dir else None
    table = score_translations(
        model,
        tokenizer,
        data,
        output_dir=folder,
        defer_above=threshold,
        defer_share=options.defer_share,
        batch_size=options.batch_size,
        options=translation,
        progress=not options.json,
    )
    with not_the_input("reporting the translations"):
        _show(table, translation, options)
        if folder is not None:
            _write(table, folder, translation, options, command)


def _lines(stream: Any) -> list[str]:
    """The lines of standard input, without a byte-order mark or the ends of Windows' lines."""
    lines = [line.rstrip("\r\n") for line in stream]
    for number, line in enumerate(lines, start=1):
        if any("\ud800" <= character <= "\udfff" for character in line):  # what wasn't UTF-8
            raise ValueError(f"standard input isn't UTF-8 in line {number}: convert it.")
    if not lines:
        raise ValueError("standard input has no lines: give texts, or name a file with --dataset.")
    return [lines[0].removeprefix("\ufeff"), *lines[1:]]


def _data(options: ScoringOptions) -> Dataset:
    """The rows, sources under `source` and translations, if there are any, under `target`."""
    if options.dataset == STDIN:
        return Dataset.from_dict({"source": _lines(sys.stdin)})
    if options.dataset is None:
        pairs = load_pairs(None, options.source_column, options.target_column)
        split = options.split or "validation"
        if split not in pairs:
            raise ValueError(f"split={split!r}: {NUMBER_WORDS} have {', '.join(map(str, pairs))}.")
        rows = pairs[split]
    else:
        columns = {"source": options.source_column, "target": options.target_column}
        rows = load_rows(options.dataset, {key: column for key, column in columns.items() if column}, options.split)
    return rows.select(range(min(options.max_examples or len(rows), len(rows))))


def _show(table: Dataset, translation: TranslationOptions, options: ScoringOptions) -> None:
    """A JSON line for each source, or a table: of a file the first rows."""
    score = translation.uncertainties[0]
    if options.json:
        columns = ("source", "translation", *translation.uncertainties, "deferred", "samples", "note")
        for row in table.select_columns(list(columns)):
            values = {key: None if value != value else value for key, value in dict(row).items()}  # NaN is no JSON
            print(json.dumps(values, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table("source", "translation", score, "deferred", "note")
    rows = table if options.dataset == STDIN else table.select(range(min(SHOWN, len(table))))
    for row in map(dict, rows):
        deferred = "" if row["deferred"] is None else "yes" if row["deferred"] else "no"
        value = row[score]
        shown.add_row(row["source"], row["translation"], f"{value:.3f}", deferred, row["note"])
    Console().print(shown)


def _write(
    table: Dataset, folder: Path, translation: TranslationOptions, options: ScoringOptions, command: str
) -> None:
    """Results, with BLEU and a plot of it where there are translations to compare with."""
    name = NUMBER_WORDS if options.dataset is None else source_name(options.dataset)
    scored = table.select(np.flatnonzero(np.array(table["note"][:]) != EMPTY))
    figures = {key: float(np.mean(scored[key][:])) for key in translation.uncertainties}
    if None not in scored["deferred"][:]:
        figures["deferred"] = float(np.mean(scored["deferred"][:]))
    draws = "target" in table.column_names and not any(target is None for target in scored["target"][:])
    if draws:
        scores = {key: scored[key][:] for key in translation.uncertainties}
        curves = retention_curves(scores, scored["translation"][:], scored["target"][:])
        curve = curves[translation.uncertainties[0]]
        figures |= {"bleu": curve.at(1.0), "bleu_kept_half": curve.at(0.5)}
        if options.plot:
            plot_curves(curves, folder / PLOT)
    settings = {**asdict(translation), "defer_share": options.defer_share}
    results = write_results(
        folder / RESULTS,
        title=f"Translation uncertainty on {name}",
        command=command,
        data={"name": name, "fingerprint": data_fingerprint(table, ["source"])},
        seeds=[translation.seed],
        rows=[{"configuration": str(options.model_name_or_path), "seed": translation.seed, **figures}],
        claims=[],
        columns=[{"key": key, "title": key.replace("_", " "), "format": ".4g"} for key in figures],
        settings=settings,
        plot=PLOT if draws and options.plot else None,
    )
    print_results(results)
    print(f"translations: {folder / JSON_LINES}")
