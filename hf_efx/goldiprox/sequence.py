"""SelectionSequence: which examples each step of a proxy's run trained on, to be replayed by any other model.

"Prioritized training on points that are learnable, worth learning, and not yet learnt", Mindermann et al. 2021,
arXiv 2107.02565: a sequence that a small proxy selected is shared and trained on again, without selecting anew.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from huggingface_hub import CommitInfo

from hf_efx.core.data.tables import (
    TableCard,
    check_dataset,
    data_fingerprint,
    load_table,
    push_table,
    save_table,
    settings_of,
    with_settings,
)
from hf_efx.core.results.plots import save_figure
from hf_efx.goldiprox.recording import describe_content, iterate_steps, steps_table
from hf_efx.goldiprox.statistics import plot_statistics, sequence_statistics
from hf_efx.registry import METHODS

KIND = "selection_sequence"


class SelectionSequence:
    """A sequence of training steps: for each one the ids of its examples, in the order trained, and their scores.

    Args:
        dataset: Rows `step` (int64: 0, 1, ...), `example_ids` (list of int64), `scores` (list of float32), with the
            settings that `make`, `save_to_disk` and `push_to_hub` put on it. It stays memory-mapped.

    Raises:
        ValueError: If it is no sequence, is in another format version, or was cut, extended or changed.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.settings: dict[str, Any] = settings_of(dataset, KIND)
        _check_form(dataset, self.settings)

    @classmethod
    def make(
        cls,
        dataset: Dataset,
        data: Mapping[str, Any],
        score: Mapping[str, Any] | None = None,
        proxy: Mapping[str, Any] | None = None,
    ) -> "SelectionSequence":
        """Makes a sequence of rows [step, example_ids, scores].

        Args:
            dataset: The rows.
            data: What was selected from: `fingerprint` (of `data_fingerprint`), its `columns`, and `rows`.
            score: How was selected.
            proxy: Who selected.
        """
        content = describe_content(dataset)
        settings = {
            "kind": KIND,
            "content": content,
            "data": dict(data),
            "score": dict(score or {}),
            "proxy": dict(proxy or {}),
        }
        return cls(with_settings(dataset, settings))

    def __len__(self) -> int:
        """Its steps."""
        return len(self.dataset)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """A step's ids (int64 [n], in the order trained) and scores (float32 [n])."""
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of a sequence of {len(self)}")
        steps = next(iterate_steps(self.dataset.select([step % len(self)])))
        return steps.example_ids, steps.scores

    def __repr__(self) -> str:
        content = self.settings["content"]
        return (
            f"SelectionSequence({content['steps']:,} steps, {content['examples']:,} examples, {self.digest[:12]}...)"
        )

    @property
    def digest(self) -> str:
        """Hash of its steps, ids and scores, the same in memory, on disk and on the Hub."""
        return self.settings["content"]["digest"]

    @property
    def examples_per_step(self) -> int:
        """Examples of its largest step, which are those of each step but the last of an epoch."""
        return self.settings["content"]["examples_per_step"]

    @property
    def fewest_examples(self) -> int:
        """Examples of its smallest step."""
        return self.settings["content"]["fewest_examples"]

    def verify(self, dataset: Dataset) -> None:
        """Compares a data set with the one that was selected from.

        Args:
            dataset: The data set, with `example_id` and the columns that the fingerprint covers, in any order.

        Raises:
            ValueError: If it is another one; the message says in what.
        """
        data = self.settings["data"]
        check_dataset(dataset, "dataset", ids=True)
        missing = [name for name in data["columns"] if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"the sequence knows its data set by the columns {', '.join(data['columns'])}, but this one lacks "
                f"{', '.join(missing)}: keep the raw columns, which the Trainer leaves out of batches itself, or give "
                f"ReplayTrainer the data set that has them as raw_dataset."
            )
        if len(dataset) != data["rows"]:
            raise ValueError(
                f"the sequence was selected from a data set of {data['rows']:,} rows, this one has {len(dataset):,}: "
                f"pass the same data set."
            )
        fingerprint = data_fingerprint(dataset, data["columns"])
        if fingerprint != data["fingerprint"]:
            raise ValueError(
                f"the sequence was selected from another data set: its fingerprint over example_id, "
                f"{', '.join(data['columns'])} is {data['fingerprint']}, this one's {fingerprint}."
            )

    def shuffled(self, seed: int) -> "SelectionSequence":
        """The same examples, as often, dealt out to the steps at random: the control for what the order does.

        Args:
            seed: For the permutation. All ids and scores are in memory while it is made.
        """
        parts = list(iterate_steps(self.dataset))
        ids, scores = (np.concatenate([getattr(part, name) for part in parts]) for name in ("example_ids", "scores"))
        order = np.random.default_rng(seed).permutation(len(ids))
        cuts = np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))[:-1]
        table = steps_table(0, np.split(ids[order], cuts), np.split(scores[order], cuts))
        score = {**self.settings["score"], "shuffled": {"seed": seed, "digest": self.digest}}
        return SelectionSequence.make(Dataset(table), self.settings["data"], score, self.settings["proxy"])

    def statistics(
        self, dataset: Dataset | None = None, label_column: str | None = None, windows: int = 20
    ) -> dict[str, Any]:
        """What the sequence holds.

        Args:
            dataset: The data set that was selected from, to count a column of it.
            label_column: That column: class labels, or whether an example is corrupted.
            windows: Parts of the sequence that `scores` and `labels` are given for.

        Returns:
            `steps`, `examples`, `unique_examples`, `repeated` (share of the examples trained on that had been trained
            on before), `times_chosen` (how many examples were chosen once, twice, ...), `scores` (5, 25, 50, 75 and
            95% quantiles by part), and with a label column `labels`: each label's share in the data, in the sequence
            and by part.

        Raises:
            ValueError: If only one of `dataset` and `label_column` is given, or the data set lacks the column or ids.
        """
        return sequence_statistics(self.dataset, dataset, label_column, windows)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        dataset: Dataset | None = None,
        label_column: str | None = None,
        windows: int = 20,
    ) -> Any:
        """Draws `statistics`: scores by step, how often examples are chosen, and shares of the labels.

        Args:
            path: Where to save the image; None for nowhere.
            dataset: As for `statistics`.
            label_column: As for `statistics`.
            windows: As for `statistics`.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: If matplotlib (the extra `plot`) isn't installed.
        """
        figure = plot_statistics(self.statistics(dataset, label_column, windows))
        if path is not None:
            save_figure(figure, path)
        return figure

    def save_to_disk(self, folder: str | os.PathLike[str]) -> Path:
        """Saves it as Arrow with a card, whole or not at all; see `core.tables.save_table`."""
        return save_table(self.dataset, folder, self._card("load_from_disk"), self.plot)

    @classmethod
    def load_from_disk(cls, folder: str | os.PathLike[str]) -> "SelectionSequence":
        """Maps a saved sequence.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it holds no sequence, or a damaged one.
        """
        if not Path(folder).expanduser().is_dir():  # not the Hub's, whose names look alike
            raise FileNotFoundError(f"folder={os.fspath(folder)!r}: there is no such folder")
        return cls(load_table(folder, KIND))

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Sends it to the Hub as a data set that the viewer shows, with a card.

        Args:
            repo_id: The repository, made if missing.
            **options: `private`, `token`, `revision`, `commit_message`; see `core.tables.push_table`.

        Returns:
            The commit; its `oid` is the revision to name for exactly this sequence.
        """
        return push_table(self.dataset, repo_id, self._card("from_hub"), self.plot, **options)

    @classmethod
    def from_hub(cls, repo_id: str, **options: Any) -> "SelectionSequence":
        """Fetches a sequence.

        Args:
            repo_id: The repository.
            **options: `revision`, `token`, `cache_dir`; see `core.tables.load_table`.

        Raises:
            FileNotFoundError: If there is no such repository.
            ValueError: If it holds no sequence, or a damaged one.
        """
        return cls(load_table(repo_id, KIND, **options))

    def _card(self, loader: str) -> TableCard:
        figures = self.statistics(windows=1)
        scores = figures.pop("scores")[0]
        times = figures.pop("times_chosen")
        figures |= {"most_often_chosen": max(times), "median_score": scores["q50"]}
        selection = self.settings["score"].get("selection", "a rule of its maker's")
        return TableCard(
            title="Selection sequence",
            description=_DESCRIPTION.format(selection=selection, **self.settings["content"]),
            columns={
                "step": "Optimizer step, from 0.",
                "example_ids": "The examples that the step trains on, by `example_id`, in the order trained.",
                "scores": "What each of them scored when it was chosen.",
            },
            usage=_USAGE.replace("LOADER", loader),
            figures=figures,
            caption="Scores of the chosen examples by step, and how often examples are chosen.",
            tags=("goldiprox", "data-selection"),
            citations=(METHODS["goldiprox"].citation, METHODS["rho_loss"].citation),
        )


_DESCRIPTION = """\
A training sequence that a small proxy model chose ({selection}) while it trained: {steps:,} steps of up to
{examples_per_step} examples. Any other model trains on it in the same order, without scoring anything. It names
examples by id and holds none of the data: the data set that it was selected from is known by its fingerprint among the
settings below, and another one is refused."""

_USAGE = """\
from hf_efx import ReplayTrainer, SelectionSequence

sequence = SelectionSequence.LOADER("{source}")
trainer = ReplayTrainer(model, args, train_dataset=dataset, sequence=sequence)  # dataset: with its example_id column
trainer.train()"""


def _check_form(dataset: Dataset, settings: Mapping[str, Any]) -> None:
    features = Features(
        {"step": Value("int64"), "example_ids": List(Value("int64")), "scores": List(Value("float32"))}
    )
    if dict(dataset.features) != dict(features):
        raise ValueError(f"a selection sequence has the columns {features}, but this table has {dataset.features}.")
    absent = [name for name in ("content", "data", "score", "proxy") if name not in settings]
    if absent:
        raise ValueError(f"the sequence's settings lack {', '.join(absent)}: make it with SelectionSequence.make.")
    try:
        found = describe_content(dataset)
    except ValueError as error:
        raise ValueError(
            f"the sequence was changed after it was made: {error} Fetch or load the whole one again."
        ) from error
    expected = settings["content"]
    for name, value in found.items():
        if value != expected.get(name):
            raise ValueError(
                f"the sequence was cut, extended or changed after it was made: its {name} is {value}, its settings "
                f"say {expected.get(name)}. Fetch or load the whole one again."
            )
