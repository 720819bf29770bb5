"""Text sources, byte-level tokenizers, blocks and fingerprints, on files written here."""

import gzip
import hashlib
import inspect
import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, GPT2Config

from hf_efx.core.data import library_text
from hf_efx.core.data.text_data import (
    TextCollator,
    byte_tokenizer,
    content_fingerprint,
    load_text,
    source_name,
    standard_library_text,
    tokenize_blocks,
    train_tokenizer,
)

ODD_TEXT = "A  tab\t, 'quotes' . caf\u00e9 cafe\u0301 \u4e2d\u6587 \U0001f600 \x00 \x7f\x80 \u2028\r\n\n ends "


def write(path: Path, content: str) -> str:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_standard_library_text_is_english_and_disjoint():
    library = standard_library_text()
    everything = [text for texts in library.values() for text in texts]
    assert sum(map(len, everything)) > 1_500_000
    assert len(set(everything)) == len(everything)
    assert (inspect.getdoc(textwrap.wrap) or "").split("\n\n")[0] in everything
    assert any("statement is used for conditional execution" in text for text in everything)  # the topic `if`
    assert min(map(len, everything)) >= 40
    assert 0.02 < len(library["validation"]) / len(everything) < 0.04
    assert all(library_text.split_of(library_text.hash_place(text)) == "test" for text in library["test"])


def test_split_by_hash_never_changes():
    # sha256("hello") begins with 2cf24dba5fb0a30e: 0x2cf24dba / 2^32 = 0.17557...
    assert library_text.hash_place("hello") == pytest.approx(0.175572, abs=1e-6)
    assert [library_text.split_of(place) for place in (0.0, 0.0299, 0.03, 0.9699, 0.97)] == [
        "validation",
        "validation",
        "train",
        "train",
        "test",
    ]


def test_source_texts_reads_docstrings_and_comments_without_running():
    source = b'"""Module."""\n# One\n#: two\nclass A:\n    """Class.\n\n    More."""\nraise SystemExit\n'
    assert list(library_text._source_texts(source)) == ["Module.", "Class.\n\nMore.", "One\ntwo\n"]
    assert list(library_text._source_texts(b"def (:\n")) == []


def test_text_without_source_is_the_library_read_once(monkeypatch):
    library = standard_library_text()
    monkeypatch.setattr(library_text, "_library_texts", None)
    loaded = load_text()
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["validation"]["text"][:] == library["validation"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.tsv.gz", 'split\ttext\tn\ntrain\t"open quote\t1\nvalid\tNA\t2\nTRAIN\ta "b" c\t3\ntest\t007\t4\n'),
        ("rows.csv", 'split,text,n\ntrain,"""open quote",1\nvalid,NA,2\ntrain,"a ""b"" c",3\ntest,007,4\n'),
        (
            "rows.jsonl",
            "".join(
                json.dumps({"split": split, "text": text, "n": n}) + "\n"
                for split, text, n in [
                    ("train", '"open quote', 1),
                    ("dev", "NA", 2),
                    ("train", 'a "b" c', 3),
                    ("test", "007", 4),
                ]
            ),
        ),
    ],
)
def test_tables_with_a_split_column_keep_every_row(tmp_path, name, content):
    loaded = load_text(write(tmp_path / name, content), cache_dir=str(tmp_path / "cache"))
    assert {split: part["text"][:] for split, part in loaded.items()} == {
        "train": ['"open quote', 'a "b" c'],
        "validation": ["NA"],
        "test": ["007"],
    }
    assert loaded["train"]["n"][:] == [1, 3]
    assert loaded["train"].column_names == ["text", "n"]


def test_parquet_with_another_text_column(tmp_path):
    path = str(tmp_path / "rows.parquet")
    Dataset.from_dict({"body": ["one", "two", "three"], "text": [1, 2, 3]}).to_parquet(path)
    loaded = load_text(path, "body", cache_dir=str(tmp_path / "cache"))
    assert sorted(text for part in loaded.values() for text in part["text"]) == ["one", "three", "two"]
    assert list(loaded) == ["train", "validation"]  # too little for the hash to find one: a document must do


def test_plain_text_by_paragraph_line_and_document(tmp_path):
    path = write(tmp_path / "book.txt", "one\nstill one\n\ntwo\r\n\r\n \n\nthree\n")

    def documents(sample_by):
        loaded = load_text(path, sample_by=sample_by, cache_dir=str(tmp_path / "cache"))
        return sorted(text.strip() for part in loaded.values() for text in part["text"])

    assert documents("paragraph") == ["one\nstill one", "three", "two"]
    assert documents("line") == ["one", "still one", "three", "two"]
    with pytest.raises(ValueError, match="holds one document, too little for a validation split.*sample_by='line'"):
        documents("document")


def test_folder_with_files_named_after_splits(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.txt", "first")
    write(tmp_path / "data" / "more.md", "second")
    write(tmp_path / "data" / "val.txt", "held out")
    loaded = load_text(tmp_path / "data", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["train"]["text"]) == ["first", "second"]
    assert loaded["validation"]["text"][:] == ["held out"]
    assert set(loaded) == {"train", "validation"}


def test_hash_split_depends_on_the_text_alone(tmp_path):
    texts = [f"paragraph number {i}" for i in range(300)]
    first = load_text(write(tmp_path / "a.txt", "\n\n".join(texts)), cache_dir=str(tmp_path / "cache"))
    # Twice the rows in another order: no text may stand in two splits, and none changes its split.
    second = load_text(write(tmp_path / "b.txt", "\n\n".join(texts[::-1] * 2)), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "validation", "test"):
        expected = {text for text in texts if library_text.split_of(library_text.hash_place(text)) == split}
        assert set(first[split]["text"]) == set(second[split]["text"]) == expected
        assert len(second[split]) == 2 * len(expected) > 0


def test_data_sets_from_the_hub(hub, run_python):
    code = """
        import json
        from datasets import Dataset
        from hf_efx.core.data.text_data import load_text

        for config, words in (("raw", ["r one", "r two"]), ("clean", ["c one", "c two"])):
            Dataset.from_dict({"body": words}).push_to_hub("tester/corpus", config, split="train")
        Dataset.from_dict({"text": ["alone"]}).push_to_hub("tester/split", split="train")
        Dataset.from_dict({"text": ["held out"]}).push_to_hub("tester/split", split="validation")
        loaded = {name: load_text(name, column) for name, column in
            (("tester/corpus:raw", "body"), ("tester/corpus:clean", "body"), ("tester/split", "text"))}
        try:
            load_text("tester/nothing")
        except FileNotFoundError as error:
            message = str(error)
        try:
            load_text("tester/corpus", "body")
        except ValueError as error:
            choice = str(error)
        texts = {name: {split: part["text"][:] for split, part in splits.items()} for name, splits in loaded.items()}
        print(json.dumps([texts, message, choice]))
    """
    texts, message, choice = json.loads(run_python(code, env=hub.env).splitlines()[-1])
    assert texts["tester/split"] == {"train": ["alone"], "validation": ["held out"]}
    for config in ("raw", "clean"):
        splits = texts[f"tester/corpus:{config}"]
        assert set(splits) == {"train", "validation"}
        assert sorted(splits["train"] + splits["validation"]) == [f"{config[0]} one", f"{config[0]} two"]
    assert "source='tester/nothing' is no file or folder here, and the Hub says: " in message
    assert "raw" in choice and "clean" in choice


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.docx", "x", ValueError, r"unknown suffix '\.docx'; known are \.txt"),
        ("a.csv", "body,n\nx,1\n", ValueError, "no column text_column='text'; it has body, n"),
        ("a.jsonl", '{"text": 1}\n', ValueError, r"column text_column='text' holds Value\('int64'\), not text"),
        ("a.csv", 'text,n\n"",1\n" ",2\n', ValueError, "all text of 'train' is empty"),
        ("a.txt", "", ValueError, "can't be read as text"),
        ("a.jsonl", "", ValueError, "can't be read as json: it is empty"),
        ("a.tsv", "text\tn\na\t1\nb\t2\t3\n", ValueError, "can't be read as csv: .*Expected 2 fields in line 3, saw"),
        ("a.csv", "text,split\na,fold1\nb,fold2\n", ValueError, r"no 'train' split, only \['fold1', 'fold2'\]"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, error, message):
    with pytest.raises(error, match=message):
        load_text(write(tmp_path / name, content), cache_dir=str(tmp_path / "cache"))


def test_missing_and_mixed_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        load_text("corpora/missing.txt")
    with pytest.raises(FileNotFoundError, match="the folder holds none of .txt"):
        load_text(tmp_path)
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "b.csv", "text\nx\n")
    with pytest.raises(ValueError, match=r"mixes \['.csv', '.txt'\]: name one file, or a folder of one kind"):
        load_text(tmp_path)
    with pytest.raises(ValueError, match="sample_by='page': it is"):
        load_text(tmp_path / "a.txt", sample_by="page")  # type: ignore[arg-type]


def test_source_names_hold_no_folder(tmp_path):
    write(tmp_path / "book.txt", "x")
    assert source_name(tmp_path / "book.txt") == "book.txt" and source_name(tmp_path) == tmp_path.name
    assert source_name("owner/corpus:raw") == "owner/corpus:raw"
    assert source_name(None) == f"standard library text of Python {sys.version.split()[0]}"


def test_rows_without_text_are_left_out_and_said(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "  "}\n{"text": "two"}\n')
    with caplog.at_level(logging.INFO, "hf_efx.core.data"):
        loaded = load_text(path, cache_dir=str(tmp_path / "cache"))
    assert sorted(text for part in loaded.values() for text in part["text"]) == ["one", "two"]
    assert "2 of 4 rows hold no text" in caplog.text


def test_byte_tokenizer_loses_nothing():
    tokenizer = byte_tokenizer()
    assert tokenizer("h\u00e9").input_ids == [0x68, 0xC3, 0xA9]
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (257, 256, 256)
    for text in (ODD_TEXT, "", " ", "".join(map(chr, range(1, 3000)))):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_byte_tokenizer_loads_without_hf_efx(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    GPT2Config(vocab_size=257, bos_token_id=256, eos_token_id=256).save_pretrained(tmp_path)  # as beside a model
    code = (
        "import json, sys; from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path)!r}); x = {ODD_TEXT!r}\n"
        "ids = t(x).input_ids; assert t.decode(ids) == x and 'hf_efx' not in sys.modules\n"
        "print(json.dumps([ids == list(x.encode()), t.eos_token_id, len(t)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(out.stdout.splitlines()[-1]) == [True, 256, 257]


def test_trained_tokenizer(tmp_path):
    corpus = DatasetDict({"train": Dataset.from_dict({"text": ["low lower lowest"] * 20})})
    tokenizer = train_tokenizer(corpus, vocab_size=260)
    # 257 + 3 merges; "lo" is the commonest pair, then "low", then " low" in " lower" and " lowest".
    assert len(tokenizer) == 260
    assert {"lo", "low", "\u0120low"} <= set(tokenizer.get_vocab())
    assert tokenizer.decode(tokenizer(ODD_TEXT).input_ids) == ODD_TEXT
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(ODD_TEXT).input_ids == tokenizer(ODD_TEXT).input_ids
    with pytest.raises(ValueError, match="vocab_size=256 has no room for the 256 bytes"):
        train_tokenizer(corpus, 256)


def test_packing_joins_documents_and_drops_the_rest(caplog):
    texts = ["abc", "de", "f", "ghij", "k"]  # 16 tokens with their ends
    with caplog.at_level(logging.INFO, "hf_efx.core.data"):
        blocks = tokenize_blocks(Dataset.from_dict({"text": texts, "n": range(5)}), byte_tokenizer(), 5)
    assert blocks.column_names == ["input_ids"]
    assert blocks["input_ids"][:] == [
        [97, 98, 99, 256, 100],
        [101, 256, 102, 256, 103],
        [104, 105, 106, 256, 107],
    ]
    assert "3 blocks of 5 tokens; 1 tokens at the end dropped" in caplog.text


def test_packing_carries_over_map_batches():
    texts = [f"{i} " * (i % 7) for i in range(2500)]  # map works in batches of 1,000
    stream = [token for text in texts for token in (*text.encode(), 256)]
    blocks = tokenize_blocks(Dataset.from_dict({"text": texts}), byte_tokenizer(), 64)
    packed = [token for block in blocks["input_ids"] for token in block]
    assert len(packed) == len(stream) // 64 * 64
    assert packed == stream[: len(packed)]


def test_line_mode_keeps_one_document_an_example():
    dataset = Dataset.from_dict({"text": ["abc", "abcd", "abcdef"], "example_id": [7, 8, 9]})
    lines = tokenize_blocks(dataset, byte_tokenizer(), 4, mode="line")
    assert lines["input_ids"][:] == [[97, 98, 99, 256], [97, 98, 99, 100], [97, 98, 99, 100]]
    assert lines["example_id"][:] == [7, 8, 9]


def test_blocks_are_cached_by_content_and_settings(tmp_path):
    path = write(tmp_path / "a.txt", "\n\n".join(f"paragraph {i}" for i in range(50)))
    train = load_text(path, cache_dir=str(tmp_path / "cache"))["train"]
    first = tokenize_blocks(train, byte_tokenizer(), 8)
    assert tokenize_blocks(train, byte_tokenizer(), 8).cache_files == first.cache_files != []
    assert tokenize_blocks(train, byte_tokenizer(), 16).cache_files != first.cache_files
    other = tokenize_blocks(train, train_tokenizer(train, 300), 8)
    assert other.cache_files != first.cache_files and len(other) < len(first)


def test_a_tokenizers_own_truncation_does_not_cut():
    tokenizer = byte_tokenizer()
    tokenizer("abcdef", truncation=True, max_length=2)  # leaves the backend in truncating state
    assert tokenize_blocks(Dataset.from_dict({"text": ["abcd"]}), tokenizer, 5)["input_ids"][:] == [
        [97, 98, 99, 100, 256]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "block"}, "mode='block': it is 'pack' or 'line'"),
        ({"block_size": 1}, "block_size=1"),
        ({"block_size": 100}, "fewer tokens than one block of block_size=100"),
        ({"dataset": Dataset.from_dict({"body": ["x"]})}, "no column 'text', only body"),
    ],
)
def test_unusable_block_arguments(arguments, message):
    usual = {"dataset": Dataset.from_dict({"text": ["abc"]}), "tokenizer": byte_tokenizer(), "block_size": 4}
    with pytest.raises(ValueError, match=message):
        tokenize_blocks(**{**usual, **arguments})


def test_tokenizer_without_end_of_text():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize_blocks(Dataset.from_dict({"text": ["abc"]}), tokenizer, 4)


def test_collator_masks_padding_but_not_the_end_of_text():
    batch = TextCollator(pad_token_id=256)(
        [{"input_ids": [1, 2, 256], "example_id": 4, "name": "x"}, {"input_ids": [3], "example_id": 5, "name": "y"}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 256], [3, 256, 256]]
    assert batch["labels"].tolist() == [[1, 2, 256], [3, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["example_id"].tolist() == [4, 5]
    assert "name" not in batch
    assert set(TextCollator(256)([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])) == {"input_ids", "labels"}


def test_fingerprint_is_of_the_content(tmp_path):
    rows = {"text": ["a", "b", "c"], "n": [1, 2, 3]}
    first = Dataset.from_dict(rows)
    # By hand: the header line, then each row's values by column name.
    lines = ['["", ["n", "text"]]', '[1, "a"]', '[2, "b"]', '[3, "c"]']
    assert content_fingerprint(first) == hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    path = str(tmp_path / "rows.parquet")
    first.to_parquet(path)
    again = datasets.load_dataset("parquet", data_files=path, cache_dir=str(tmp_path / "cache"))["train"]
    assert again._fingerprint != first._fingerprint
    assert content_fingerprint(again.select_columns(["n", "text"])) == content_fingerprint(first)
    assert content_fingerprint(first.select([2, 1, 0]).select([2, 1, 0])) == content_fingerprint(first)
    assert content_fingerprint(first.select([0, 2, 1])) != content_fingerprint(first)
    assert content_fingerprint(first.rename_column("n", "m")) != content_fingerprint(first)
    assert content_fingerprint(DatasetDict({"train": first})) != content_fingerprint(DatasetDict({"test": first}))
    assert content_fingerprint(Dataset.from_dict({"b": [b"\x01", None]})) != content_fingerprint(
        Dataset.from_dict({"b": [b"\x02", None]})
    )
