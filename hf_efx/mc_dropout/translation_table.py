"""Translating a list, a data set or a file with uncertainty, into a table that a killed run goes on with."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from tqdm.auto import tqdm

from hf_efx.core.data.example_ids import ID_COLUMN, add_example_ids, check_dataset, table_column
from hf_efx.core.data.fingerprints import data_fingerprint, tokenizer_fingerprint, weights_fingerprint
from hf_efx.core.data.tables import write_arrow
from hf_efx.core.data.text_files import column_texts, load_rows, text_columns
from hf_efx.core.files import whole_file, write_atomically
from hf_efx.mc_dropout.options import TranslationOptions, checked_threshold
from hf_efx.mc_dropout.threshold import DeferralThreshold, choose_threshold
from hf_efx.mc_dropout.translate import Translation, Translator

ARROW, JSON_LINES, SETTINGS = "translations.arrow", "translations.jsonl", "settings.json"
_PARTIAL = ".translations.partial.jsonl"


def score_translations(
    model: Any,
    tokenizer: Any,
    data: Sequence[str] | Dataset | str | os.PathLike[str],
    *,
    source_column: str | None = None,
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
    and a finished one is read: another `defer_above` then acts without a call of the model. Rows are the same whatever
    the batches, but for the rounding of their scores.

    Args:
        model: Any transformers model that generates, dropout in its config.
        tokenizer: Its tokenizer.
        data: Texts, a data set, or the name of a file, a folder of files or a data set on the Hub, as the program
            takes them. Other columns are kept; `example_id` keys the masks (rows without are numbered).
        source_column: The texts' column, with a dot inside a nested one ("translation.de"); None is "source", of
            plain text files "text".
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
        less certain, NaN for an empty source), `deferred` (null without a threshold), `note` and the data's other
        columns, which the JSON lines leave out.

    Raises:
        FileNotFoundError: For the name of no file, folder or data set.
        ImportError: If sacrebleu isn't installed.
        ValueError: For no text at all, a column that isn't there or no text, a source that is too long (see
            `TranslationOptions.truncation`), fewer than two samples, a threshold made with another model, score or
            number of samples, a folder with rows of another model, data or setting. Nothing is written then.
    """
    own, generate_kwargs = TranslationOptions.split(generate_kwargs)
    options = dataclasses.replace(options or TranslationOptions(), **own)
    _check_arguments(options, batch_size, defer_above, defer_share)
    dataset = _sources(data, source_column)
    rest = dataset.remove_columns([ID_COLUMN, "source"])
    if taken := sorted(set(rest.column_names) & set(_schema(options).names)):
        raise ValueError(f"the data has a column {taken[0]!r}, which the scores need: rename or remove it.")
    translator = Translator(model, tokenizer, options, **generate_kwargs)
    threshold = checked_threshold(defer_above, translator)
    settings: dict[str, Any] = {}
    if output_dir is not None:  # nothing else reads them, and they cost a pass over the weights
        settings = {
            "options": {**dataclasses.asdict(options), "max_batch_rows": None},
            "generation": translator.settings(),
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
        threshold = _chosen(done, defer_share, options, settings, rows.folder)
    for row in done:
        score = row[options.scores[0]]
        row["deferred"] = None if threshold is None else score is not None and score > threshold
    return rows.finish(done, rest, _schema(options))


def _check_arguments(options: TranslationOptions, batch_size: int, defer_above: Any, defer_share: Any) -> None:
    if options.num_samples < 2:
        raise ValueError(f"num_samples={options.num_samples}: one sample has nothing to differ from, give 2 or more.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more.")
    if defer_above is not None and defer_share is not None:
        raise ValueError(f"defer_above={defer_above!r} and defer_share={defer_share!r}: give one of them.")
    if defer_share is not None and not 0 < defer_share < 1:
        raise ValueError(f"defer_share={defer_share!r}: expected a share above 0 and below 1.")


def _chosen(
    rows: list[dict[str, Any]], share: float, options: TranslationOptions, settings: dict[str, Any], folder: Any
) -> float:
    """The threshold that defers this share, which goes into the folder."""
    name = options.scores[0]
    scores = [row[name] for row in rows if row[name] is not None]
    made = {"score": name, "num_samples": options.num_samples, "masks": options.masks}
    made |= {key: settings.get(key) for key in ("model", "generation")}
    threshold = choose_threshold(scores, share, **made)
    if folder is not None:
        threshold.save(folder)
    return threshold.defer_above


def _sources(data: Any, column: str | None) -> Dataset:
    """The data with ids and its texts under the name `source`."""
    if isinstance(data, os.PathLike) or (isinstance(data, str) and (Path(data).exists() or len(data.split()) == 1)):
        dataset, name = load_rows(data, {} if column is None else {"source": column}), os.fspath(data)
    elif isinstance(data, str):
        raise ValueError(f"data={data[:60]!r} is one text: give a list of texts, or the name of a file.")
    elif isinstance(data, (Dataset, IterableDataset, Mapping)):
        dataset, name, column = check_dataset(data, "data"), "data", column or "source"
        if column != "source" and "source" in dataset.column_names:
            raise ValueError(f"source_column={column!r}: the data has a column 'source' too, rename or remove it.")
        dataset = text_columns(dataset, {"source": column}, name, drop_empty=False)
    else:
        texts, name = list(data), "data"
        if wrong := [text for text in texts if text is not None and not isinstance(text, str)]:
            raise ValueError(f"data holds {str(wrong[0])[:60]!r}, a {type(wrong[0]).__name__}: give a list of texts.")
        dataset = Dataset.from_dict({"source": texts}, Features({"source": Value("string")}))
    if not any(text and text.strip() for text in column_texts(dataset, "source")):
        raise ValueError(f"source={name!r}: all of {len(dataset)} rows are empty.")
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
    scores = dict.fromkeys(options.scores, pa.float64())
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
        held = [name for name in (ARROW, JSON_LINES, _PARTIAL) if (folder / name).exists()]
        if held and not (folder / SETTINGS).exists():
            raise ValueError(f"output_dir={str(folder)!r} holds translations without {SETTINGS}: name another folder.")
        if held:
            self._check(json.loads((folder / SETTINGS).read_bytes()))
        for name in held:
            if name != ARROW:
                self._read(folder / name)

    def _check(self, there: dict[str, Any]) -> None:
        there, here = (_flat(one) for one in (there, json.loads(json.dumps(self.settings))))
        if changed := sorted(key for key in {*there, *here} if there.get(key) != here.get(key)):
            shown = ", ".join(f"{key}={there.get(key)!r}, now {here.get(key)!r}" for key in changed)
            raise ValueError(
                f"output_dir={str(self.folder)!r} holds translations made otherwise ({shown}): use those settings, or "
                f"name another folder."
            )

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        self.done |= {row[ID_COLUMN]: row for row in map(json.loads, whole.splitlines())}  # of bytes: \n alone parts
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keeps rows, on the disk before this returns."""
        if self.folder is not None:
            if not self.done:
                text = json.dumps(self.settings, indent=1, ensure_ascii=False)
                write_atomically(self.folder / SETTINGS, text + "\n")
            with open(self.folder / _PARTIAL, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        self.done |= {row[ID_COLUMN]: row for row in rows}

    def finish(self, rows: list[dict[str, Any]], rest: Dataset, schema: pa.Schema) -> Dataset:
        """The table of these rows, written into the folder if there is one."""
        table = pa.Table.from_pylist(rows, schema)
        for name in (f.name for f in schema if pa.types.is_float64(f.type)):
            at = table.column_names.index(name)
            table = table.set_column(at, name, table[name].fill_null(math.nan))
        features = {**Features.from_arrow_schema(table.schema), **rest.features}
        for name in rest.column_names:
            table = table.append_column(name, table_column(rest, name))
        table = table.cast(Features(features).arrow_schema)  # whose metadata say what is a label, an image
        if self.folder is None:
            return Dataset(table)
        with whole_file(self.folder / JSON_LINES) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_arrow(self.folder / ARROW, table.schema, [table])
        (self.folder / _PARTIAL).unlink(missing_ok=True)
        return Dataset.from_file(str(self.folder / ARROW))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the groups that they stand in."""
    groups = [value if isinstance(value, dict) else {name: value} for name, value in settings.items()]
    return {name: value for group in groups for name, value in group.items()}
