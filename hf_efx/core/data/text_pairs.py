"""Pairs of texts for translation: from files, folders and Hub data sets, or number words where none are named."""

import os

from datasets import DatasetDict

from hf_efx.core.data.number_words import number_words
from hf_efx.core.data.text_files import cut_splits, load_splits, text_columns

NUMBER_WORDS = "number words"


def load_pairs(
    source: str | os.PathLike[str] | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    *,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Loads pairs as `train`, `validation` and, where there are enough of them, `test`.

    Splits are kept or cut as in `text_data.load_text`, here by the hash of the source text: equal sources share a
    split. Pairs that lack one of their texts are dropped, and counted in the log.

    Args:
        source: None for `number_words`; a table (.tsv, .csv, .json, .jsonl, .parquet, all but the last also as .gz), a
            folder of such files of one kind, or a data set on the Hub, `"name"` or `"name:config"`.
        source_column: Where the table holds what is translated. It is called `source` in what comes back; columns
            beside the pair are kept. A dot reaches into nested columns: `"translation.de"`. None for "source", of
            number words "de".
        target_column: The same of the translation, `target`. None for "target", of number words "en".
        cache_dir: Where `datasets` keeps its Arrow files; None for its default.

    Raises:
        FileNotFoundError: If the source isn't there.
        ImportError: If num2words is needed and isn't installed.
        ValueError: If the source can't be read, a column is missing or no text, or no pair is left.
    """
    defaults = ("de", "en") if source is None else ("source", "target")
    columns: dict[str, str] = {"source": source_column or defaults[0], "target": target_column or defaults[1]}
    if columns["source"] == columns["target"]:
        raise ValueError(f"source_column and target_column are both {columns['source']!r}: name two columns")
    if source is None:
        parts = {"train": text_columns(number_words(), columns, NUMBER_WORDS)}
    else:
        parts = load_splits(source, columns, cache_dir=cache_dir)
    return cut_splits(parts, "source", NUMBER_WORDS if source is None else source)
