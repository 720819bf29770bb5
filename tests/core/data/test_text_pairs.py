"""Pairs for translation: files, their splits, bad input, number words; and the vocabulary that is trained on them."""

import gzip
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import MarianTokenizer

from hf_efx.core.data.library_text import hash_place, split_of
from hf_efx.core.data.marian_tokenizer import train_marian_tokenizer
from hf_efx.core.data.number_words import number_words
from hf_efx.core.data.text_pairs import load_pairs


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Writes bytes into a file of the name, and loads pairs from it."""

    def load_(name: str, content: str | bytes, *columns: str | None) -> Any:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return load_pairs(tmp_path / name, *columns, cache_dir=str(tmp_path / "cache"))

    return load_


def rows(part: Any) -> list[tuple[str, str]]:
    return list(zip(part["source"], part["target"], strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv.gz", 'split\tde\ten\tnl\ntrain\t"eins\t007\t\nvalid\tzwei\tNA\ttwee\ntest\tdrei\tthree\tx\n'),
        ("a.csv", '\ufeffde,en,nl,split\n"""eins",007,,train\nzwei,NA,twee,valid\ndrei,three,x,test\n'),
        (
            "a.jsonl",
            '{"split": "train", "de": "\\"eins", "en": "007", "nl": ""}\n'
            '{"split": "valid", "de": "zwei", "en": "NA", "nl": "twee"}\n'
            '{"split": "test", "de": "drei", "en": "three", "nl": "x"}\n',
        ),
    ],
)
def test_tables_keep_splits_texts_and_further_columns(load: Any, name: str, content: str) -> None:
    pairs = load(name, content, "de", "en")
    assert {split: rows(part) for split, part in pairs.items()} == {
        "train": [('"eins', "007")],
        "validation": [("zwei", "NA")],
        "test": [("drei", "three")],
    }
    assert pairs["validation"]["nl"][:] == ["twee"] and "de" not in pairs["train"].column_names


def test_columns_may_be_nested_swapped_or_have_the_other_s_name(load: Any, tmp_path: Path) -> None:
    texts = [{"de": f"Zahl {i}", "en": f"number {i}"} for i in range(60)]
    Dataset.from_dict({"translation": texts}).to_parquet(tmp_path / "a.parquet")
    nested = load_pairs(tmp_path / "a.parquet", "translation.de", "translation.en", cache_dir=str(tmp_path))
    assert sorted(sum(map(rows, nested.values()), [])) == sorted((text["de"], text["en"]) for text in texts)
    for split, part in nested.items():  # by the source's hash, whatever else the table holds
        assert len(part) and {split_of(hash_place(text)) for text in part["source"]} == {split}
    swapped = load("a.tsv", "split\tsource\ttarget\ntrain\ta\tb\nvalid\tc\td\n", "target", "source")
    assert (rows(swapped["train"]), rows(swapped["validation"])) == ([("b", "a")], [("d", "c")])
    other = load("b.tsv", "split\tsource\ttarget\tx\ntrain\ta\tb\tX\nvalid\tc\td\tY\n", "x")
    assert rows(other["train"]) == [("X", "b")]


def test_pairs_that_lack_a_text_are_dropped_and_counted(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_efx"):
        pairs = load("a.tsv", "source\ttarget\na\tb\nc\t\n \td\ne\tf\n")
    assert sorted(rows(pairs["train"]) + rows(pairs["validation"])) == [("a", "b"), ("e", "f")]
    assert "2 of 4 rows hold no text" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "columns", "words"),
    [
        ("a.tsv", "de\ten\na\tb\n", ("de",), "no column target_column='target'; it has de, en"),
        ("a.tsv", "de\ten\na\tb\n", ("x.de", "en"), "no column source_column='x.de'; it has de, en"),
        ("a.tsv", "de\ten\na\tb\n", ("de", "de"), "source_column and target_column are both 'de'"),
        ("a.txt", "only text\n", (), "no column source_column='source'; it has text"),
        ("a.jsonl", '{"source": "a", "target": 1}\n', (), r"target_column='target' holds Value\('int64'\), not text"),
        ("a.tsv", "source\ttarget\na\t\n", (), "all text of 'train' is empty"),
        (
            "a.tsv",
            "source\ttarget\na\tb\n",
            (),
            "holds one pair, too little for a validation split: .* a `split` column$",
        ),
        ("a.tsv", b"source\ttarget\na\tb\xe4\n", (), r"a.tsv isn't UTF-8 from byte 17 on \(0xe4\)"),
        ("a.csv.gz", b"source,target\n" + b"a,b\n" * 300_000 + b"a,\xff\n", (), "isn't UTF-8 from byte 1200016 on"),
        ("a.jsonl", b'{"source": "a", "target": "\xe4"}\n', (), "a.jsonl isn't UTF-8 from byte 27 on"),
        ("a.tsv", "source\ttarget\na\tb\n".encode("utf-16"), (), "a.tsv isn't UTF-8 from byte 0 on"),
        ("a.csv", "source,target\na,\u00e4".encode()[:-1], (), "a.csv isn't UTF-8 from byte 16 on"),
    ],
)
def test_bad_input_is_named(load: Any, name: str, content: Any, columns: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(name, content, *columns)


def test_without_a_source_pairs_are_number_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = number_words()
    assert len(words) == len(set(words["de"])) == 19_000
    assert words[21] == {"de": "einundzwanzig", "en": "twenty-one", "nl": "eenentwintig"}
    kinds = {"zweite": "second", "neunzehnhundertvierundachtzig": "nineteen eighty-four"}
    kinds |= {"zwei Euro und vierundsiebzig Cent": "two euro, seventy-four cents"}
    assert kinds.items() <= dict(zip(words["de"], words["en"], strict=True)).items()
    german, dutch = load_pairs(), load_pairs(None, "nl")
    assert sum(map(len, german.values())) == 19_000 and len(german["test"]) > 500
    assert german["train"].column_names == ["source", "target", "nl"] and dutch["train"].column_names[0] == "de"
    with pytest.raises(ValueError, match="source='number words' has no column source_column='fr'; it has de, en, nl"):
        load_pairs(None, "fr")
    number_words.cache_clear()
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "num2words", None)
        with pytest.raises(ImportError, match=r"pip install 'hf_efx\[mt\]'"):
            load_pairs()


TEXTS = [
    "Datei \u00f6ffnen \u2026",
    "Open file \u2026",
    "Datei l\u00f6schen?",
    "Delete\u00a0file?",
    "100 % <b>\ufb01n</b>",
    "\U0001f600 ok",
]


def test_a_vocabulary_gives_back_what_it_reads(tmp_path: Path) -> None:
    made = train_marian_tokenizer(tmp_path / "a", TEXTS, 36, max_length=64)
    loaded = MarianTokenizer.from_pretrained(tmp_path / "a")  # a warning would fail here
    assert {file.name for file in (tmp_path / "a").iterdir()} == {
        *("source.spm", "target.spm", "vocab.json", "tokenizer_config.json")
    }
    assert (len(made), made.eos_token_id, made.unk_token_id, made.pad_token_id) == (36, 0, 1, 35)
    assert loaded.get_vocab() == made.get_vocab() and loaded.model_max_length == 64
    for text in TEXTS:  # without normalisation: no-break spaces, ligatures and ellipses stay
        for ids in (loaded(text).input_ids, loaded(text_target=text).input_ids):
            assert ids[-1] == 0 and 1 not in ids and loaded.decode(ids, skip_special_tokens=True) == text
    again = train_marian_tokenizer(tmp_path / "b", TEXTS, 36)
    assert again.get_vocab() == made.get_vocab()
    assert (tmp_path / "a" / "source.spm").read_bytes() == (tmp_path / "b" / "target.spm").read_bytes()


@pytest.mark.parametrize(
    ("size", "words"), [(500, "vocab_size=500 .*too high"), (20, "vocab_size=20 .*required_chars")]
)
def test_a_vocabulary_that_does_not_go_with_the_text_leaves_nothing(tmp_path: Path, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_marian_tokenizer(tmp_path / "new", TEXTS, size)
    assert not list(tmp_path.iterdir())
