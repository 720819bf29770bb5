"""Translating a list, a data set or a file with uncertainty, into a table that a killed run goes on with."""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from hf_efx.core.data.example_ids import ID_COLUMN, add_example_ids, table_column
from hf_efx.core.data.fingerprints import data_fingerprint, tokenizer_fingerprint, weights_fingerprint
from hf_efx.core.data.tables import write_arrow
from hf_efx.core.files import whole_file, write_atomically
from hf_efx.mc_dropout.options import TranslationOptions, checked_threshold
from hf_efx.mc_dropout.threshold import DeferralThreshold, choose_threshold
from hf_efx.mc_dropout.translate import Translation, Translator

logger = logging.getLogger(__name__)

ARROW, JSON_LINES, SETTINGS = "translations.arrow", "translations.jsonl", "settings.json"
_PARTIAL = ".translations.partial.jsonl"


def score_translations(
    model: Any,
    tokenizer: Any,
    data: Sequence[str] | Dataset,
    *,
    source_column: str = "source",
    output_dir: str | os.PathLike[str] | None = None,
    defer_above: float | DeferralThreshold | None = None,
    defer_share: float | None = None,
    batch_size: int = 16,
    options: TranslationOptions | None = None,
    progress: bool = True,
    **generate_kwargs: Any,
) -> Dataset:
    """Translates texts and says of each how uncertain the model is.

    With a folder the rows are on the disk after each batch: a killed run, started again, goes on behind the last one,
    and a finished one is read. Rows are the same whatever the batches.

    Args:
        model: Any transformers model that generates, dropout in its config.
        tokenizer: Its tokenizer.
        data: Texts, or a data set with a column of them; its other columns are kept, `example_id` keys the masks (rows
            without are numbered).
        source_column: That column.
        output_dir: Folder of translations.arrow (for `Dataset.from_file`), translations.jsonl and settings.json.
        defer_above: What is deferred: scores above this, or a threshold that `choose_threshold` made.
        defer_share: Instead, the share of these sources that is deferred. The threshold that does is written into
            the folder as uncertainty.json: beside the model's files the pipeline takes it from there.
        batch_size: Sources that are taken at a time.
        options: How translations and samples are made, and which scores; None for the defaults.
        progress: Whether to show a bar.
        **generate_kwargs: Fields of `TranslationOptions`, such as `num_samples=20`, or of `generate`'s own arguments.

    Returns:
        In the data's order `example_id`, `source`, `translation`, `samples`, a column for each uncertainty (higher is
        less certain, NaN for an empty source), `deferred` (null without `defer_above`), `note` and the data's other
        columns.

    Raises:
        ValueError: For no text at all, a column that isn't there or no text, a source that is too long (see
            `TranslationOptions.truncation`), fewer than two samples, a threshold made with another model, score or
            number of samples, a folder with rows of another model, data or setting.
    """
    options, generate_kwargs = _with_fields(options, generate_kwargs)
    if options.num_samples < 2:
        raise ValueError(f"num_samples={options.num_samples}: one sample has nothing to differ from, give 2 or more.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more.")
    dataset = _sources(data, source_column)
    translator = Translator(model, tokenizer, options, **generate_kwargs)
    if defer_above is not None and defer_share is not None:
        raise ValueError(f"defer_above={defer_above!r} and defer_share={defer_share!r}: give one of them.")
    if defer_share is not None and not 0 < defer_share < 1:
        raise ValueError(f"defer_share={defer_share!r}: expected a share above 0 and below 1.")
    threshold = checked_threshold(defer_above, options, translator.model)
    rest = dataset.remove_columns([ID_COLUMN, "source"])
    if taken := sorted(set(rest.column_names) & set(_schema(options).names)):
        raise ValueError(f"the data has a column {taken[0]!r}, which the scores need: rename or remove it.")
    settings = {
        "options": dataclasses.asdict(options) | {"max_batch_rows": None},
        "generate": {key: repr(value) for key, value in sorted(generate_kwargs.items())},
        "model": weights_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": data_fingerprint(dataset, ["source"]),
    }
    rows = _Rows(None if output_dir is None else Path(output_dir), settings)
    texts, ids = [text or "" for text in dataset["source"]], dataset[ID_COLUMN]
    translator.check(texts)  # what doesn't fit shows at once
    # Sorted, a batch has little padding.
    left = [i for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])) if ids[i] not in rows.done]
    with tqdm(total=len(texts), initial=len(texts) - len(left), desc="sources", disable=not progress) as bar:
        for start in range(0, len(left), batch_size):
            places = left[start : start + batch_size]
            found = translator([texts[i] for i in places], [ids[i] for i in places])
            rows.add([_row(ids[i], one) for i, one in zip(places, found, strict=True)])
            bar.update(len(places))
    done = [rows.done[i] for i in ids]
    if defer_share is not None:
        threshold = _chosen(done, defer_share, options, settings["model"], rows.folder)
    for row in done:
        score = row[options.uncertainties[0]]
        row["deferred"] = None if threshold is None else score is not None and score > threshold
    return rows.finish(done, rest, _schema(options))


def _chosen(rows: list[dict[str, Any]], share: float, options: TranslationOptions, model: str, folder: Any) -> float:
    """The threshold that defers this share, which goes into the folder."""
    name = options.uncertainties[0]
    scores = [row[name] for row in rows if row[name] is not None]
    made = {"score": name, "num_samples": options.num_samples, "masks": options.masks, "model": model}
    threshold = choose_threshold(scores, share, **made)
    if folder is not None:
        threshold.save(folder)
    return threshold.defer_above


def _with_fields(
    options: TranslationOptions | None, given: dict[str, Any]
) -> tuple[TranslationOptions, dict[str, Any]]:
    """The options with those among the keywords that are fields of theirs, and the other keywords."""
    names = {f.name for f in dataclasses.fields(TranslationOptions)}
    own = {name: value for name, value in given.items() if name in names}
    rest = {name: value for name, value in given.items() if name not in names}
    return dataclasses.replace(options or TranslationOptions(), **own), rest


def _sources(data: Sequence[str] | Dataset, column: str) -> Dataset:
    """The data with ids and its texts under the name `source`."""
    if isinstance(data, str):
        raise ValueError(f"data={data[:60]!r} is one text: give a list of texts, or a data set.")
    dataset = data if isinstance(data, Dataset) else Dataset.from_dict({"source": list(data)})
    column = column if isinstance(data, Dataset) else "source"
    if column not in dataset.column_names:
        raise ValueError(f"source_column={column!r} isn't there; the data has {', '.join(dataset.column_names)}.")
    if column != "source":
        dataset = dataset.remove_columns([name for name in ("source",) if name in dataset.column_names])
        dataset = dataset.rename_column(column, "source")
    kind = dataset.features["source"]
    if len(dataset) and getattr(kind, "dtype", "") not in ("string", "large_string"):
        raise ValueError(f"source_column={column!r} holds {kind}, not text.")
    if not any(text and text.strip() for text in dataset["source"]):
        raise ValueError(f"source_column={column!r}: all of {len(dataset)} rows are empty.")
    return add_example_ids(dataset)


def _row(example: int, one: Translation) -> dict[str, Any]:
    scores = {name: None if math.isnan(value) else value for name, value in one.uncertainties.items()}
    return {
        ID_COLUMN: example,
        "source": one.source,
        "translation": one.translation,
        "samples": list(one.samples),
        **scores,
        "note": one.note,
    }


def _schema(options: TranslationOptions) -> pa.Schema:
    texts = {"source": pa.string(), "translation": pa.string(), "samples": pa.list_(pa.string())}
    scores = dict.fromkeys(options.uncertainties, pa.float64())
    names = {ID_COLUMN: pa.int64(), **texts, **scores, "deferred": pa.bool_(), "note": pa.string()}
    return pa.schema(list(names.items()))


class _Rows:
    """Rows as they come, in a folder if there is one: appended to a file there, whose torn last line is cut off."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.done: dict[int, dict[str, Any]] = {}
        if folder is None:
            return
        if folder.is_file():
            raise ValueError(f"output_dir={str(folder)!r} is a file: name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SETTINGS).exists():
            self._check(json.loads((folder / SETTINGS).read_bytes()))
            for name in (JSON_LINES, _PARTIAL):
                if (folder / name).exists():
                    self._read(folder / name)
        elif any((folder / name).exists() for name in (ARROW, JSON_LINES, _PARTIAL)):
            raise ValueError(f"output_dir={str(folder)!r} holds translations without {SETTINGS}: name another folder.")
        else:
            write_atomically(folder / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")

    def _check(self, there: dict[str, Any]) -> None:
        there, here = ({**one, **one.get("options", {}), "options": None} for one in (there, self.settings))
        here = json.loads(json.dumps(here))
        if changed := sorted(key for key in {*there, *here} if there.get(key) != here.get(key)):
            shown = ", ".join(f"{key}={there.get(key)!r}, now {here.get(key)!r}" for key in changed)
            raise ValueError(
                f"output_dir={str(self.folder)!r} holds translations made otherwise ({shown}): use those settings, or "
                f"name another folder."
            )

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        self.done |= {row[ID_COLUMN]: row for row in map(json.loads, whole.decode().splitlines())}
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keeps rows, on the disk before this returns."""
        self.done |= {row[ID_COLUMN]: row for row in rows}
        if self.folder is not None:
            with open(self.folder / _PARTIAL, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())

    def finish(self, rows: list[dict[str, Any]], rest: Dataset, schema: pa.Schema) -> Dataset:
        """The table of these rows, written into the folder if there is one."""
        table = pa.Table.from_pylist(rows, schema)
        for name in (f.name for f in schema if pa.types.is_float64(f.type)):
            at = table.column_names.index(name)
            table = table.set_column(at, name, table[name].fill_null(math.nan))
        for name in rest.column_names:
            table = table.append_column(name, table_column(rest, name))
        if self.folder is None:
            return Dataset(table)
        with whole_file(self.folder / JSON_LINES) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_arrow(self.folder / ARROW, table.schema, [table])
        (self.folder / _PARTIAL).unlink(missing_ok=True)
        return Dataset.from_file(str(self.folder / ARROW))
