"""Tables of translations: every row once, the same however they were made, and nothing of another run."""

import json
import math

import datasets
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value

from hf_efx.core.data.fingerprints import weights_fingerprint
from hf_efx.mc_dropout import (
    UNCERTAINTIES,
    DeferralThreshold,
    TranslationOptions,
    Translator,
    choose_threshold,
    register_uncertainty,
    score_translations,
)
from hf_efx.mc_dropout.translation_table import ARROW, JSON_LINES, SETTINGS
from mc_dropout.translators import POSITIONS, SOURCES, built

FILES = [SETTINGS, ARROW, JSON_LINES]


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    return built("marian", tmp_path_factory.mktemp("marian") / "model")


def score(marian, data=SOURCES, **given):
    return score_translations(*marian, data, **{"num_samples": 2, "max_new_tokens": 5, "progress": False, **given})


def rows_of(table):
    """Rows by id, NaN as None, so that they compare."""
    rows = {row["example_id"]: dict(row) for row in table}
    return {i: {k: None if v != v else v for k, v in row.items()} for i, row in rows.items()}


def assert_same(one, other):
    for i, row in rows_of(one).items():
        twin = rows_of(other)[i]
        assert {k: v for k, v in row.items() if not isinstance(v, float)} == {
            k: v for k, v in twin.items() if not isinstance(v, float)
        }
        floats = [k for k, v in row.items() if isinstance(v, float)]
        assert [row[k] for k in floats] == pytest.approx([twin[k] for k in floats], rel=1e-9)


@pytest.fixture
def calls(monkeypatch):
    """The sources of each call of the translator."""
    made = []
    real = Translator.__call__

    def call(self, sources, ids):
        made.append(list(sources))
        return real(self, sources, ids)

    monkeypatch.setattr(Translator, "__call__", call)
    return made


def test_a_table_holds_what_the_translator_says(marian, tmp_path):
    table = score(marian, output_dir=tmp_path, defer_above=0.5)
    options = TranslationOptions(num_samples=2, max_new_tokens=5)
    for row, one in zip(table, Translator(*marian, options)(SOURCES, range(len(SOURCES))), strict=True):
        assert (row["source"], row["translation"], row["note"]) == (one.source, one.translation, one.note)
        assert row["samples"] == list(one.samples)
        scores = {name: row[name] for name in options.uncertainties}
        assert scores == pytest.approx(one.uncertainties, rel=1e-9, nan_ok=True)
        assert row["deferred"] == (row["bleuvar"] > 0.5)
    assert table["example_id"][:] == list(range(len(SOURCES)))
    empty = table[3]
    assert (empty["translation"], empty["samples"], empty["note"]) == ("", [], "empty source")
    assert math.isnan(empty["bleuvar"]) and empty["deferred"] is False
    mapped = Dataset.from_file(str(tmp_path / ARROW))
    assert rows_of(mapped) == rows_of(table) and mapped.features == table.features
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_json_lines_are_json(marian, tmp_path):
    sources = ["eins\u2028zwei", "drei\x85vier\x0bacht", 'a "quote"\\', "", "😀"]
    table = score(marian, sources, output_dir=tmp_path)

    def no_nan(word):
        raise AssertionError(word)

    lines = (tmp_path / JSON_LINES).read_bytes().split(b"\n")
    rows = [json.loads(line, parse_constant=no_nan) for line in lines if line]
    assert [row["source"] for row in rows] == sources and rows[3]["bleuvar"] is None
    assert rows_of(score(marian, sources, output_dir=tmp_path)) == rows_of(table)


def test_rows_are_the_same_whatever_the_batches_and_the_order(marian):
    ids = list(range(100, 100 + len(SOURCES)))
    data = Dataset.from_dict({"example_id": ids, "source": SOURCES})
    whole = score(marian, data)
    for given, rows in (({"batch_size": 1}, data), ({"max_batch_rows": 3}, data.shuffle(seed=0))):
        assert_same(score(marian, rows, **given), whole)
    part = data.select([5, 2])
    assert_same(score(marian, part), whole)
    assert score(marian, part)["example_id"][:] == [105, 102]


def test_other_columns_are_kept_with_their_features(marian, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "n": Value("int8")})
    data = Dataset.from_dict({"text": SOURCES[:3], "label": [1, 0, 1], "n": [3, 4, 5]}, features).select([2, 0])
    table = score(marian, data, source_column="text", output_dir=tmp_path)
    assert table["label"][:] == [1, 1] and table["n"][:] == [5, 3] and table["source"][:] == [SOURCES[2], SOURCES[0]]
    for made in (table, Dataset.from_file(str(tmp_path / ARROW))):
        assert made.features["label"] == features["label"] and made.features["n"] == features["n"]


def test_nested_columns(marian):
    data = Dataset.from_dict({"translation": [{"de": "eins", "en": "one"}, {"de": "zwei", "en": "two"}]})
    table = score(marian, data, source_column="translation.de")
    assert table["source"][:] == ["eins", "zwei"] and table["translation.en"][:] == ["one", "two"]


def test_files_are_read(marian, tmp_path):
    (tmp_path / "letters.txt").write_text("\ufeffeins\r\n\r\nzwei\r\n", encoding="utf-8", newline="")
    (tmp_path / "pairs.tsv").write_text("de\ten\neins\tone\n\t\nzwei\ttwo\n", encoding="utf-8")
    lines = score(marian, tmp_path / "letters.txt")
    assert lines["source"][:] == ["eins", "", "zwei"]
    pairs = score(marian, str(tmp_path / "pairs.tsv"), source_column="de")
    assert [text or "" for text in pairs["source"]] == ["eins", "", "zwei"] and "en" in pairs.column_names
    assert pairs["samples"][0] == lines["samples"][0]


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on_without_a_row_twice_or_missing(torn, marian, tmp_path, monkeypatch, calls):
    whole = score(marian, output_dir=tmp_path / "whole", batch_size=2)
    calls.clear()
    kept = Translator.__call__

    def killed(self, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(self, *args)

    monkeypatch.setattr(Translator, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        score(marian, output_dir=tmp_path / "cut", batch_size=2)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [".translations.partial.jsonl", SETTINGS]
    if torn:
        partial = tmp_path / "cut" / ".translations.partial.jsonl"
        partial.write_bytes(partial.read_bytes()[:-7])
    calls.clear()
    monkeypatch.setattr(Translator, "__call__", kept)
    again = score(marian, output_dir=tmp_path / "cut", batch_size=2)
    assert sum(map(len, calls)) == len(SOURCES) - 4 + torn
    assert_same(again, whole)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(FILES)


def test_a_finished_folder_is_read_and_deferred_anew(marian, tmp_path, calls):
    first = score(marian, output_dir=tmp_path)
    assert first["deferred"][:] == [None] * len(SOURCES)
    calls.clear()
    scores = [value for value in first["bleuvar"] if value == value]
    for above in (min(scores), max(scores)):
        table = score(marian, output_dir=tmp_path, defer_above=above, batch_size=3, max_batch_rows=7)
        assert table["deferred"][:] == [value > above for value in first["bleuvar"]]
        assert Dataset.from_file(str(tmp_path / ARROW))["deferred"][:] == table["deferred"][:]
    assert calls == []
    assert rows_of(table.remove_columns("deferred")) == rows_of(first.remove_columns("deferred"))


def test_a_folder_of_another_run_is_refused(marian, tmp_path, calls):
    model, tokenizer = marian
    score(marian, output_dir=tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    other = built("marian", tmp_path.parent / "other")[0]
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    longer = built("marian", tmp_path.parent / "longer")[1]
    longer.add_tokens(["neunzig"])
    calls.clear()
    cases = [
        (marian, SOURCES, {"num_samples": 3}, "num_samples=2, now 3"),
        (marian, SOURCES, {"seed": 1}, "seed=0, now 1"),
        (marian, SOURCES, {"masks": "sequence"}, "masks='position', now 'sequence'"),
        (marian, SOURCES, {"uncertainties": ["bleuvar"]}, "uncertainties="),
        (marian, SOURCES, {"no_repeat_ngram_size": 2}, "answers.no_repeat_ngram_size=None, now '2'"),
        (marian, [*SOURCES, "neun"], {}, "data="),
        (marian, SOURCES[::-1], {}, "data="),
        ((other, tokenizer), SOURCES, {}, "model="),
        ((model, longer), SOURCES, {}, "tokenizer="),
    ]
    for made, data, given, words in cases:
        with pytest.raises(ValueError, match="holds translations made otherwise") as refused:
            score(made, data, output_dir=tmp_path, **given)
        assert words in str(refused.value) and "name another folder" in str(refused.value)
    decoder = model.model.decoder
    decoder.dropout, rate = 0.5, decoder.dropout  # the weights are the same
    try:
        with pytest.raises(ValueError, match=r"dropout='\[0.0, 0.2\]', now '\[0.0, 0.2, 0.5\]'"):
            score(marian, output_dir=tmp_path)
    finally:
        decoder.dropout = rate
    model.generation_config.num_beams = 2
    try:
        with pytest.raises(ValueError, match="answers.num_beams='1', now '2'"):
            score(marian, output_dir=tmp_path)
    finally:
        model.generation_config.num_beams = None
    assert calls == [] and {name: (tmp_path / name).read_bytes() for name in FILES} == before
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(ValueError, match=f"holds translations without {SETTINGS}"):
        score(marian, output_dir=tmp_path)


def test_functions_are_told_apart_and_what_cannot_be_is_not_resumed(marian, tmp_path, calls):
    try:
        for value in (1.0, 2.0):
            register_uncertainty("mine", lambda texts, value=value: [value] * len(texts))
            given = {"uncertainties": ["mine"], "output_dir": tmp_path / str(value)}
            assert score(marian, **given)["mine"][0] == score(marian, **given)["mine"][0] == value
        assert len(calls) == 2
        with pytest.raises(ValueError, match="made otherwise .score mine="):
            score(marian, uncertainties=["mine"], output_dir=tmp_path / "1.0")
    finally:
        UNCERTAINTIES.pop("mine")
    processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(2.0)])
    score(marian, logits_processor=processors, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="can't be compared"):
        score(marian, logits_processor=processors, output_dir=tmp_path / "out")


def test_a_share_is_deferred_and_its_threshold_kept(marian, tmp_path):
    table = score(marian, output_dir=tmp_path, defer_share=0.5)
    threshold = DeferralThreshold.load(tmp_path)
    assert threshold.model == weights_fingerprint(marian[0]) and threshold.sources == len(SOURCES) - 2
    assert (threshold.num_samples, threshold.masks, threshold.score) == (2, "position", "bleuvar")
    assert table["deferred"][:] == [value > threshold.defer_above for value in table["bleuvar"]]
    assert score(marian, defer_above=threshold)["deferred"][:] == table["deferred"][:]
    for given in ({"sites": ["decoder"]}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.5}):
        with pytest.raises(ValueError, match="the threshold .* was made with .*(sites|num_beams|do_sample)"):
            score(marian, defer_above=threshold, **given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"data": "Wo ist der Bahnhof?"}, "data='Wo ist der Bahnhof[?]' is one text: give a list"),
        ({"data": []}, "all of 0 rows are empty"),
        ({"data": ["", " ", None]}, "all of 3 rows are empty"),
        ({"data": ["eins", 2]}, "data holds '2', a int: give a list of texts"),
        ({"data": Dataset.from_dict({"text": ["a"]})}, "source_column='source'; it has text"),
        ({"data": Dataset.from_dict({"n": [1]}), "source_column": "n"}, "source_column='n' holds Value"),
        (
            {"data": Dataset.from_dict({"source": ["a"], "de": ["b"]}), "source_column": "de"},
            "has a column 'source' too",
        ),
        ({"data": Dataset.from_dict({"source": ["a"], "bleuvar": [1]})}, "the data has a column 'bleuvar'"),
        ({"data": Dataset.from_dict({"source": ["a"], "translation": ["b"]})}, "the data has a column 'translation'"),
        ({"data": Dataset.from_dict({"source": ["a", "b"], "example_id": [1, 1]})}, "1"),
        ({"data": Dataset.from_dict({"source": ["a"]}).to_iterable_dataset()}, "without streaming=True"),
        ({"data": datasets.DatasetDict({"train": Dataset.from_dict({"source": ["a"]})})}, "load one split"),
        ({"data": ["eins " * POSITIONS]}, "give truncation=True to have it cut"),
        ({"num_samples": 1}, "num_samples=1: one sample"),
        ({"num_samples": 0}, "num_samples=0: one sample"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": 2**63}, "seed=9223372036854775808: expected 0 or more, below"),
        ({"defer_above": math.nan}, "defer_above=nan: expected a finite number"),
        ({"defer_share": 1.0}, "defer_share=1.0: expected a share"),
        ({"defer_share": 0.1, "defer_above": 0.5}, "give one of them"),
        ({"num_return_sequences": 2}, "num_return_sequences=2: the samples of a source are num_samples"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample=True"),
        ({"defer_above": choose_threshold([0.1, 0.2], num_samples=5)}, "made with num_samples=5, not 2"),
        ({"defer_above": choose_threshold([0.1, 0.2], num_samples=2, score="epkl")}, "made with score='epkl'"),
        ({"defer_above": choose_threshold([0.1, 0.2], num_samples=2, model="abc")}, "made with model='abc'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(given, match, marian, tmp_path, calls):
    with pytest.raises(ValueError, match=match):
        score(marian, given.pop("data", SOURCES), output_dir=tmp_path / "out", **given)
    assert calls == [] and not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused(marian):
    for model in ("you/model", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="load a transformers model"):
            score((model, marian[1]))


def test_bad_files_are_refused_before_anything_is_written(marian, tmp_path):
    (tmp_path / "latin.txt").write_bytes("eins\nfünf\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt isn't UTF-8 from byte 6 on \(0xfc\)"):
        score(marian, tmp_path / "latin.txt", output_dir=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"there is no such file or folder"):
        score(marian, "letters.txt", output_dir=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        score(marian, output_dir=tmp_path / "file")
    assert not (tmp_path / "out").exists()
