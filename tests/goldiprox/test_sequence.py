"""The record of a sequence: writing it, surviving a kill, reading it back, refusing what was changed, its figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, load_from_disk

from hf_efx.core.data.tables import data_fingerprint, with_settings
from hf_efx.goldiprox import recording
from hf_efx.goldiprox.recording import SequenceRecorder, describe_content
from hf_efx.goldiprox.sequence import SelectionSequence

IDS = [[7, 3], [3, 9, 7], [3]]
SCORES = [[0.5, 1.5], [2.0, -1.0, 0.25], [float("-inf")]]
# sha256 over the sha256 of each column: steps, examples a step, ids, scores. Published sequences are known by it.
DIGEST = "d9a1aabcc9bfb5721256c18c3dcde6102326efb8ddea62c4384207ed29c63a78"
DATA = {"fingerprint": "f" * 64, "columns": ["text"], "rows": 4}
SETTINGS = {"score": {"selection": "rho_loss"}}


def rows(ids: list[list[int]], scores: list[list[float]]) -> Dataset:
    table = recording.steps_table(0, [np.array(i) for i in ids], [np.array(s) for s in scores])
    return Dataset(table)


def sequence(ids: list[list[int]] = IDS, scores: list[list[float]] = SCORES) -> SelectionSequence:
    return SelectionSequence.make(rows(ids, scores), DATA, {"selection": "rho_loss"}, {"model": "Tiny"})


def record(recorder: SequenceRecorder, first: int, end: int) -> None:
    """Steps whose ids and scores tell which they are."""
    for step in range(first, end):
        recorder.add(step, np.arange(3) + 10 * step, np.full(3, step / 2, np.float32))


def recorded(dataset: Dataset) -> list[list[int]]:
    return [row["example_ids"] for row in dataset]


# --- the recording


def test_recording_holds_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_FLUSH_AFTER", 6)  # two steps to a shard
    recorder = SequenceRecorder.begin(tmp_path, SETTINGS)
    record(recorder, 0, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "settings.json",
        "steps-000000000-000000001.arrow",
        "steps-000000002-000000003.arrow",
    ]
    dataset = recorder.finish()
    assert dataset.to_dict() == {
        "step": [0, 1, 2, 3, 4],
        "example_ids": [[10 * s, 10 * s + 1, 10 * s + 2] for s in range(5)],
        "scores": [[s / 2] * 3 for s in range(5)],
    }
    assert recorder.settings == SETTINGS
    assert all(Path(file["filename"]).parent == tmp_path for file in dataset.cache_files)  # mapped, not copied


# Shards: steps 0-1, 2-3, 4-5; step 6 was in memory when the run was killed.
@pytest.mark.parametrize("checkpoint", [0, 1, 2, 3, 6])
def test_killed_and_resumed_it_equals_a_recording_without_a_break(
    checkpoint: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_FLUSH_AFTER", 6)
    record(SequenceRecorder.begin(tmp_path / "killed", SETTINGS), 0, 7)
    resumed = SequenceRecorder.resume(tmp_path / "killed", checkpoint)
    assert resumed.steps == checkpoint
    record(resumed, checkpoint, 9)
    whole = SequenceRecorder.begin(tmp_path / "whole", SETTINGS)
    record(whole, 0, 9)
    assert describe_content(resumed.finish()) == describe_content(whole.finish())


def test_cut_that_was_killed_half_way_is_taken_up(tmp_path: Path) -> None:
    recorder = SequenceRecorder.begin(tmp_path, SETTINGS)
    record(recorder, 0, 6)
    recorder.flush()
    longer = tmp_path / "steps-000000000-000000005.arrow"
    kept = longer.read_bytes()
    SequenceRecorder.resume(tmp_path, 4)
    assert not longer.exists()
    longer.write_bytes(kept)  # as if the kill had come before it was deleted
    (tmp_path / "steps-000000004-000000005.77.tmp").write_bytes(b"half")
    again = SequenceRecorder.resume(tmp_path, 3)
    record(again, 3, 5)
    assert recorded(again.finish()) == [[10 * s, 10 * s + 1, 10 * s + 2] for s in range(5)]


def test_recording_that_ends_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    recorder = SequenceRecorder.begin(tmp_path, SETTINGS)
    record(recorder, 0, 4)
    recorder.flush()
    for folder, there in ((tmp_path, 4), (tmp_path / "elsewhere", 0)):
        with pytest.raises(ValueError, match=f"has {there} whole steps, the checkpoint 6: .*output_dir"):
            SequenceRecorder.resume(folder, 6)
    assert len(list(tmp_path.glob("*.arrow"))) == 1  # nothing lost


def test_new_recording_replaces_the_old_one_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(SequenceRecorder.begin(tmp_path, SETTINGS), 0, 4)
    assert "Replacing" not in caplog.text
    first = SequenceRecorder.begin(tmp_path, SETTINGS)
    record(first, 0, 4)
    first.flush()
    second = SequenceRecorder.begin(tmp_path, SETTINGS)
    assert f"Replacing the recording of an earlier run in {tmp_path}" in caplog.text
    record(second, 0, 1)
    assert recorded(second.finish()) == [[0, 1, 2]]


@pytest.mark.parametrize("step, ids, scores", [(1, 2, 2), (0, 2, 3), (0, 0, 0)])
def test_steps_out_of_order_or_without_scores_are_refused(step: int, ids: int, scores: int, tmp_path: Path) -> None:
    recorder = SequenceRecorder.begin(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=f"step {step} with {ids} ids and {scores} scores can't follow the 0 steps"):
        recorder.add(step, np.arange(ids), np.zeros(scores))


# --- the sequence


def test_sequence_reads_its_steps() -> None:
    found = sequence()
    assert len(found) == 3
    for step, (ids, scores) in enumerate(zip(IDS, SCORES, strict=True)):
        assert found[step][0].tolist() == ids and found[step][0].dtype == np.int64
        assert found[step][1].tolist() == scores and found[step][1].dtype == np.float32
    assert found[-1][0].tolist() == IDS[-1]
    with pytest.raises(IndexError, match="step 3 of a sequence of 3"):
        found[3]
    assert (found.examples_per_step, found.fewest_examples) == (3, 1)
    assert found.settings["data"] == DATA and found.settings["proxy"] == {"model": "Tiny"}
    assert repr(found) == f"SelectionSequence(3 steps, 6 examples, {DIGEST[:12]}...)"


def test_digest_is_of_the_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sequence().digest == DIGEST
    monkeypatch.setattr(recording, "_READ_AT_ONCE", 2)
    assert sequence().digest == DIGEST
    assert sequence([[3, 7], *IDS[1:]]).digest != DIGEST  # the order within a step counts
    assert sequence([[7, 3], [3, 9], [7, 3]], [[0.5, 1.5], [2, -1], [0.25, float("-inf")]]).digest != DIGEST


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    saved = sequence()
    folder = saved.save_to_disk(tmp_path / "mine")
    loaded = SelectionSequence.load_from_disk(folder)
    assert loaded.settings == saved.settings
    assert loaded.dataset.to_dict() == saved.dataset.to_dict()
    assert loaded.dataset.cache_files  # mapped
    assert SelectionSequence(load_from_disk(folder)).digest == DIGEST  # pyright: ignore[reportArgumentType]
    card = (folder / "README.md").read_text()
    assert 'SelectionSequence.load_from_disk("mine")' in card and "rho_loss" in card
    assert "2107.02565" in card and (folder / "histogram.png").stat().st_size > 5000
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        SelectionSequence.load_from_disk(tmp_path / "nowhere")


def changed(kind: str) -> Dataset:
    """A sequence with something done to it behind its back; the settings still say what it was."""
    whole = sequence()
    if kind == "truncated":
        return whole.dataset.select([0, 1])
    if kind == "no sequence":
        return with_settings(whole.dataset, {**whole.settings, "kind": "irreducible_losses"})
    if kind == "newer":
        settings = json.loads(whole.dataset.info.description) | {"format_version": 99}
        whole.dataset.info.description = json.dumps(settings)
        return whole.dataset
    data = {
        "truncated, settings too": rows(IDS[:2], SCORES[:2]),
        "extended": rows([*IDS, [9]], [*SCORES, [0.0]]),
        "another id": rows([[7, 4], *IDS[1:]], SCORES),
        "another score": rows(IDS, [[0.5, 1.25], *SCORES[1:]]),
        "reordered": whole.dataset.select([1, 0, 2]),
        "ids without scores": rows(IDS, SCORES).remove_columns("scores").add_column("scores", [[0.0]] * 3),  # pyright: ignore
        "no settings": rows(IDS, SCORES),
    }[kind]
    if kind == "ids without scores":
        data = data.cast(whole.dataset.features)
    return data if kind == "no settings" else with_settings(data, whole.settings)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated", "has 2 rows but was made with 3: it is truncated or extended"),
        ("truncated, settings too", "cut, extended or changed after it was made: its steps is 2, its settings say 3"),
        ("extended", "its steps is 4, its settings say 3"),
        ("another id", f"its digest is [0-9a-f]*, its settings say {DIGEST}"),
        ("another score", f"its digest is [0-9a-f]*, its settings say {DIGEST}"),
        ("reordered", "the rows from 0 on aren't the steps 0, 1"),
        ("ids without scores", "another number of scores than of example_ids"),
        ("newer", "format_version=99.*install a newer one"),
        ("no sequence", "kind='irreducible_losses'.*kind='selection_sequence' is needed"),
        ("no settings", "carries no settings"),
    ],
)
def test_changed_sequence_is_refused_with_the_reason(kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SelectionSequence(changed(kind))


def test_another_data_set_is_refused_with_the_reason() -> None:
    data = Dataset.from_dict({"example_id": [7, 3, 9, 4], "text": list("abcd"), "label": [0, 1, 0, 1]})
    known = {"fingerprint": data_fingerprint(data, ["text"]), "columns": ["text"], "rows": 4}
    made = SelectionSequence.make(rows(IDS, SCORES), known)
    made.verify(data)
    made.verify(data.shuffle(seed=0).remove_columns("label"))
    refusals: list[tuple[Dataset, str]] = [
        (data.select([0, 1, 2]), "of 4 rows, this one has 3"),
        (data.remove_columns("text"), "by the columns text, but this one lacks text.*raw_dataset"),
        (data.map(lambda row: {"text": row["text"].upper()}), f"another data set: .* is {known['fingerprint']}, this"),
        (data.remove_columns("example_id"), "no column 'example_id'"),
    ]
    for other, words in refusals:
        with pytest.raises(ValueError, match=words):
            made.verify(other)


def test_shuffled_has_the_same_examples_in_another_order() -> None:
    ids = np.arange(60).reshape(20, 3).tolist()
    ordered = sequence(ids, [[float(i) for i in step] for step in ids])
    control = ordered.shuffled(0)
    flat = [i for step in control.dataset for i in step["example_ids"]]
    assert sorted(flat) == list(range(60)) and flat != list(range(60))
    assert [i for step in control.dataset for i in step["scores"]] == flat  # each keeps its score
    assert [len(step["example_ids"]) for step in control.dataset] == [3] * 20
    assert control.digest == ordered.shuffled(0).digest != ordered.shuffled(1).digest
    assert control.settings["score"]["shuffled"] == {"seed": 0, "digest": ordered.digest}
    assert control.settings["data"] == ordered.settings["data"]


# --- figures


def test_statistics_by_hand() -> None:
    figures = sequence().statistics(windows=3)
    assert {name: figures[name] for name in ("steps", "examples", "unique_examples", "repeated")} == {
        "steps": 3,
        "examples": 6,  # 7 3 | 3 9 7 | 3
        "unique_examples": 3,
        "repeated": 0.5,
    }
    assert figures["times_chosen"] == {1: 1, 2: 1, 3: 1}  # 9 once, 7 twice, 3 three times
    assert [(row["first_step"], row["last_step"], row["q50"]) for row in figures["scores"][:2]] == [
        (0, 0, 1.0),
        (1, 1, 0.25),
    ]
    assert np.isnan(figures["scores"][2]["q50"])  # nothing finite there
    assert figures["scores"][0]["q25"] == 0.75 and figures["scores"][0]["q95"] == pytest.approx(1.45)
    whole = sequence().statistics(windows=1)["scores"]
    assert len(whole) == 1 and whole[0]["q50"] == 0.5 and whole[0]["last_step"] == 2


def test_statistics_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sequence().statistics()
    monkeypatch.setattr("hf_efx.goldiprox.statistics._COUNT_AFTER", 1)
    monkeypatch.setattr(recording, "_READ_AT_ONCE", 1)
    pieces = sequence().statistics()
    assert pieces.pop("scores")[:2] == whole.pop("scores")[:2]  # the third holds NaN
    assert pieces == whole


def test_shares_of_labels_by_hand() -> None:
    data = Dataset.from_dict({"example_id": [9, 7, 4, 3], "label": [0, 1, 1, 0]})
    data = data.cast_column("label", ClassLabel(names=["shoe", "shirt"]))
    labels = sequence().statistics(data, "label", windows=3)["labels"]
    assert labels["in_the_data"] == {"shoe": 0.5, "shirt": 0.5}
    assert labels["in_the_sequence"] == {"shoe": 4 / 6, "shirt": 2 / 6}
    assert [row["shirt"] for row in labels["by_step"]] == [1 / 2, 1 / 3, 0]
    for arguments, words in (
        ((data, None), "give both or neither"),
        ((data, "colour"), "label_column='colour': the data set has no such column"),
        ((data.select([0, 1]), "label"), "ids are not among the 2 examples"),
    ):
        with pytest.raises(ValueError, match=words):
            sequence().statistics(*arguments)
    with pytest.raises(ValueError, match="windows=0"):
        sequence().statistics(windows=0)


def test_plot_draws_the_figures(tmp_path: Path) -> None:
    data = Dataset.from_dict({"example_id": [9, 7, 4, 3], "corrupted": [True, False, False, False]})
    figure = sequence().plot(tmp_path / "new" / "plot.png", data, "corrupted", windows=2)
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    scores, times, labels = figure.axes
    assert scores.lines[0].get_ydata()[0] == 0.5  # the first of two windows: steps 0 and 1
    assert [bar.get_height() for bar in times.patches] == [1, 1, 1]
    assert [text.get_text() for text in labels.get_legend().get_texts()] == ["False", "True"]
    assert len(sequence().plot().axes) == 2


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_efx\[plot\]'"):
        sequence().plot()


# --- the Hub

PUSH_AND_PULL = """
    import json, sys
    from hf_efx.goldiprox.sequence import SelectionSequence

    sequence = SelectionSequence.load_from_disk(sys.argv[1])
    first = sequence.push_to_hub("tester/sequence").oid
    sequence.shuffled(0).push_to_hub("tester/sequence")
    sequence = SelectionSequence.from_hub("tester/sequence", revision=first)
    newest = SelectionSequence.from_hub("tester/sequence")
    found = {"settings": sequence.settings, "rows": sequence.dataset.to_dict()}
    found["mapped"] = bool(sequence.dataset.cache_files)
    found["newest"] = newest.settings["score"].get("shuffled", {}).get("digest")
    try:
        SelectionSequence.from_hub("tester/nothing")
    except FileNotFoundError as error:
        found["error"] = str(error)
    from datasets import load_dataset
    found["viewer"] = load_dataset("tester/sequence", revision=first, split="train").to_dict() == found["rows"]
    print("FOUND", json.dumps(found))
"""


def test_pushed_and_pulled_it_is_identical(hub: Any, run_python: Callable[..., str], tmp_path: Path) -> None:
    saved = sequence()
    folder = saved.save_to_disk(tmp_path / "mine")
    env = {**hub.env, "HF_HOME": str(tmp_path / "home")}
    found = json.loads(run_python(PUSH_AND_PULL, env=env, args=[folder]).partition("FOUND ")[2])
    assert found["settings"] == saved.settings
    assert found["rows"] == saved.dataset.to_dict()
    assert found["mapped"] and found["viewer"]
    assert found["newest"] == saved.digest  # the other revision
    assert "source='tester/nothing' is no folder here" in found["error"]
