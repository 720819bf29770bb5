"""Tables: settings that travel with them, folders, cards, the Hub over real HTTP, and memory."""

import json
import logging
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import yaml
from datasets import Dataset, load_from_disk
from PIL import Image

from hf_efx.core.data.tables import (
    TableCard,
    histogram,
    load_table,
    plot_histogram,
    save_table,
    settings_of,
    with_settings,
    write_arrow,
)

CARD = TableCard(
    title="A table", description="Of figures.", columns={"value": "the figure"}, usage='load("{source}")', tags=["odd"]
)


def table(rows: int = 5, kind: str = "figures", **settings) -> Dataset:
    columns = {"example_id": np.arange(rows) * 3, "value": np.arange(rows, dtype=np.float32) / 4}
    return with_settings(Dataset.from_dict(columns), {"kind": kind, **settings})


def test_settings_travel_with_the_rows(tmp_path):
    plain = Dataset.from_dict({"value": [1.0, 2.0]})
    made = with_settings(plain, {"kind": "figures", "deep": {"a": [1, None, "é"]}})
    assert settings_of(made) == {
        "kind": "figures",
        "deep": {"a": [1, None, "é"]},
        "format_version": 1,
        "table_rows": 2,
    }
    assert plain.info.description == ""  # a copy carries them
    made.save_to_disk(tmp_path / "plain")
    assert settings_of(load_from_disk(tmp_path / "plain"), "figures")["deep"] == {"a": [1, None, "é"]}
    assert settings_of(load_table(tmp_path / "plain", "figures"))["table_rows"] == 2
    assert settings_of(made.select([1, 0]), "figures")["kind"] == "figures"


def test_what_is_no_such_table_is_refused():
    with pytest.raises(ValueError, match="columns value carries no settings.*of kind 'figures'"):
        settings_of(Dataset.from_dict({"value": [1.0]}), "figures")
    with pytest.raises(ValueError, match="kind='sequence', but kind='figures' is needed"):
        settings_of(table(kind="sequence"), "figures")
    with pytest.raises(ValueError, match="has 4 rows but was made with 5: it is truncated or extended"):
        settings_of(table().select(range(4)))
    newer = table()
    newer.info.description = newer.info.description.replace('"format_version": 1', '"format_version": 2')
    with pytest.raises(ValueError, match="format_version=2; this hf_efx reads up to 1: install a newer one"):
        settings_of(newer)
    with pytest.raises(ValueError, match="settings need a 'kind'"):
        with_settings(table(), {"rows": 5})
    with pytest.raises(ValueError, match="settings of kind='figures' are no JSON"):
        table(broken=float("nan"))


def test_saved_table_is_mapped_and_the_same(tmp_path):
    made = table(2500, model="tiny")
    folder = save_table(made, tmp_path / "new" / "folder", CARD)
    loaded = load_table(folder, "figures")
    assert loaded[:] == made[:]
    assert loaded.features == made.features
    assert settings_of(loaded) == settings_of(made)
    assert [Path(file["filename"]).parent for file in loaded.cache_files] == [folder]
    assert len(loaded.data.column("value").chunks) == 1  # datasets writes 1,000 rows a batch, which are slow to search
    assert (folder.stat().st_mode & 0o777) == 0o755
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_table_replaces_its_own_kind_and_nothing_else(tmp_path):
    folder = save_table(table(3), tmp_path / "folder", CARD)
    old = load_table(folder, "figures")
    save_table(with_settings(old, {"kind": "figures", "again": True}), folder, CARD)  # onto the file it is mapped from
    assert settings_of(load_table(folder, "figures"))["again"]
    assert old["value"][:] == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match="holds a table of kind='figures', which isn't written over"):
        save_table(table(kind="sequence"), folder, CARD)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes' holds something else, which isn't written over: name a new folder"):
        save_table(table(), tmp_path / "notes", CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "notes"]


def test_a_failing_save_leaves_what_was_there(tmp_path):
    folder = save_table(table(3), tmp_path / "folder", CARD)

    def fail(path):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_table(table(4), folder, CARD, fail)
    assert len(load_table(folder, "figures")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_unreadable_sources_name_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_table(tmp_path / "nowhere", "figures")
    with pytest.raises(ValueError, match="holds no table: there is neither state.json nor settings.json in it"):
        load_table(tmp_path, "figures")
    folder = save_table(table(3), tmp_path / "folder", CARD)
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="folder' can't be read|truncated"):
        load_table(folder, "figures")


def test_card_says_what_the_table_is(tmp_path):
    figures = histogram(table(), "value")
    card = TableCard(**{**vars(CARD), "figures": {"mean": figures["mean"], "rows": 5}})
    folder = save_table(table(data={"rows": 5}), tmp_path / "t", card, lambda path: plot_histogram(figures, path, "v"))
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1]) == {"tags": ["hf_efx", "figures", "odd"]}
    for line in (
        "| `value` | `float32` | the figure |",
        'load("t")',
        "| mean | 0.5 |",
        "| data.rows | `5` |",
        "![Histogram](histogram.png)",
        'datasets.load_from_disk("t")',
    ):
        assert line in text
    with Image.open(folder / "histogram.png") as picture:
        assert picture.size == (720, 384)


def test_without_matplotlib_the_table_is_saved_without_a_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "hf_efx"):
        save_table(table(), tmp_path / "t", CARD, lambda path: plot_histogram(histogram(table(), "value"), path, "v"))
    assert "pip install 'hf_efx[plot]'" in caplog.text
    assert not (tmp_path / "t" / "histogram.png").exists()
    assert "histogram.png" not in (tmp_path / "t" / "README.md").read_text()
    assert len(load_table(tmp_path / "t", "figures")) == 5


def test_histogram_counts_numbers_and_lists_of_them():
    figures = histogram(Dataset.from_dict({"value": [0.0, 1.0, 1.0, 4.0]}), "value", bins=4)
    assert figures["counts"].tolist() == [1, 2, 0, 1]
    assert figures["edges"].tolist() == [0, 1, 2, 3, 4]
    assert {name: figures[name] for name in ("count", "mean", "std", "min", "max")} == {
        "count": 4,
        "mean": 1.5,
        "std": 1.5,  # sqrt((2.25 + 0.25 + 0.25 + 6.25) / 4)
        "min": 0.0,
        "max": 4.0,
    }
    assert histogram(Dataset.from_dict({"value": [[1.0], [], [3.0, 2.0]]}), "value")["mean"] == 2.0
    assert (
        histogram(
            Dataset.from_dict({"value": [[]]}, datasets.Features({"value": datasets.List(datasets.Value("float32"))})),
            "value",
        )["count"]
        == 0
    )


def test_write_arrow_leaves_nothing_half_written(tmp_path):
    schema = pa.schema({"value": pa.int64()})

    def tables():
        yield pa.table({"value": [1]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_arrow(tmp_path / "t.arrow", schema, tables())
    assert not list(tmp_path.iterdir())


PUSH_AND_PULL = """
    import json
    import numpy as np
    from datasets import Dataset, Features, List, Value, load_dataset
    from huggingface_hub import HfApi, hf_hub_download
    from hf_efx.core.data.tables import TableCard, histogram, load_table, plot_histogram, push_table
    from hf_efx.core.data.tables import settings_of, with_settings

    card = TableCard(title="A table", description="Of figures.", columns={}, usage="load")
    features = Features({"example_id": Value("int64"), "value": Value("float32"), "deep": List(Value("float32"))})

    def push(rows, repo="tester/figures", kind="figures"):
        values = np.float32(1) / np.arange(1, rows + 1, dtype=np.float32)
        columns = {"example_id": np.arange(rows) * 3 - 5, "value": values, "deep": [[v, 1.5] for v in values]}
        dataset = with_settings(Dataset.from_dict(columns, features), {"kind": kind, "note": "naïve", "made": rows})
        figures = histogram(dataset, "value")
        return push_table(dataset, repo, card, lambda path: plot_histogram(figures, path, "value")).oid

    first = push(2500)
    push(7)
    errors = []
    HfApi().create_repo("tester/other-data", repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=b"a", path_in_repo="a.csv", repo_id="tester/other-data", repo_type="dataset")
    for attempt in (dict(repo="tester/other-data"), dict(kind="sequence")):
        try:
            push(7, **attempt)
        except ValueError as error:
            errors.append(str(error))
    refused = errors

    first = load_table("tester/figures", "figures", revision=first)
    second = load_table("tester/figures", "figures")
    plain = load_dataset("tester/figures", split="train")
    errors = []
    for name, kind in (("nothing", "figures"), ("figures", "sequence"), ("other-data", "figures")):
        try:
            load_table(f"tester/{name}", kind)
        except (FileNotFoundError, ValueError) as error:
            errors.append(type(error).__name__ + " " + str(error))
    info = HfApi().dataset_info("tester/figures")
    print(json.dumps({
        "first": [first[:], settings_of(first), str(first.features), bool(first.cache_files)],
        "second": [second[:], settings_of(second)],
        "plain": [plain[:], str(plain.features)],
        "files": sorted(file.rfilename for file in info.siblings),
        "card": info.card_data.to_dict(),
        "readme": open(hf_hub_download("tester/figures", "README.md", repo_type="dataset")).read(),
        "errors": errors,
        "refused": refused,
    }))
"""


def test_hub_round_trip_is_identical(hub, run_python, tmp_path):
    """Pushed, and pulled into an empty cache: rows, types, settings, old revisions, the card."""
    env = hub.env | {"HF_HOME": str(tmp_path)}
    pulled = json.loads(run_python(PUSH_AND_PULL, env=env).splitlines()[-1])
    refused = pulled["refused"]
    for name, rows in (("first", 2500), ("second", 7)):
        columns, settings = pulled[name][:2]
        values = np.float32(1) / np.arange(1, rows + 1, dtype=np.float32)
        assert columns["example_id"] == list(range(-5, rows * 3 - 5, 3))
        np.testing.assert_array_equal(np.array(columns["value"], np.float64), values)  # every bit of the float32
        assert columns["deep"][1] == [0.5, 1.5]
        assert settings == {"kind": "figures", "note": "naïve", "made": rows, "format_version": 1, "table_rows": rows}
    assert (
        pulled["first"][2]
        == "{'example_id': Value('int64'), 'value': Value('float32'), 'deep': List(Value('float32'))}"
    )
    assert pulled["first"][3]  # mapped from a file
    assert pulled["plain"] == [pulled["second"][0], pulled["first"][2]]

    assert pulled["files"] == [
        ".gitattributes",
        "README.md",
        "data/train-00000-of-00001.parquet",
        "histogram.png",
        "settings.json",
    ]
    # What the data set viewer goes by.
    assert pulled["card"]["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert pulled["card"]["dataset_info"]["features"] == [
        {"name": "example_id", "dtype": "int64"},
        {"name": "value", "dtype": "float32"},
        {"name": "deep", "list": "float32"},
    ]
    assert "![Histogram](histogram.png)" in pulled["readme"]
    assert 'datasets.load_dataset("tester/figures")' in pulled["readme"]

    assert refused[0].startswith("repo_id='tester/other-data' holds another data set (a.csv)")
    assert refused[1].startswith("repo_id='tester/figures' is of kind='figures', but kind='sequence' is needed")
    assert pulled["errors"][0].startswith("FileNotFoundError source='tester/nothing' is no folder here, and the Hub")
    assert pulled["errors"][1].startswith("ValueError source='tester/figures' is of kind='figures', but kind='seq")
    assert pulled["errors"][2].startswith("ValueError source='tester/other-data' holds no table")


@pytest.mark.alone
def test_ten_million_rows_stay_under_a_gibibyte(run_python, tmp_path):
    """The whole process, imports and mapped pages included: a table is saved, mapped, checked and looked up in."""
    code = """
        import resource, sys
        from pathlib import Path

        import numpy as np
        import pyarrow as pa
        from datasets import Dataset, Features, Value
        from hf_efx.core.data.tables import with_settings, write_arrow
        from hf_efx.rho_loss.irreducible_table import IrreducibleLosses
        from hf_efx.rho_loss.irreducible_table import load_irreducible_losses, save_irreducible_losses

        rows, step, folder = 10_000_000, 1_000_000, Path(sys.argv[1])
        features = Features({"example_id": Value("int64"), "irreducible_loss": Value("float32")})
        blocks = (np.arange(start, start + step) for start in range(0, rows, step))
        tables = (pa.table({"example_id": i * 3, "irreducible_loss": i.astype(np.float32)}) for i in blocks)
        write_arrow(folder / "made.arrow", features.arrow_schema, tables)
        settings = dict(kind="irreducible_losses", granularity="example", task="classification", model_name="tiny")
        save_irreducible_losses(with_settings(Dataset.from_file(str(folder / "made.arrow")), settings), folder / "t")

        losses = IrreducibleLosses(load_irreducible_losses(folder / "t"))
        generator = np.random.default_rng(0)
        for _ in range(100):
            wanted = generator.integers(0, rows, 320)
            assert (losses.lookup(wanted * 3).numpy() == wanted.astype(np.float32)).all()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    kibibytes = int(run_python(code, args=[tmp_path]).splitlines()[-1])
    print(f"{kibibytes / 2**20:.2f} GiB")
    assert kibibytes < 2**20
