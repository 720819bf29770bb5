"""What is chosen: the share corrupted, already right or repeated, the overlap of processes, the cost of scoring.

The figures of the paper's section on why its rule works, counted while training, for any selection function.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx.core.data.example_ids import IdIndex
from hf_efx.core.files import write_atomically
from hf_efx.rho_loss.exchange import sum_over_processes
from hf_efx.rho_loss.selecting import Outcome

REPORT_NAME, _HISTORY = "selection_report.json", "history.safetensors"
_WINDOWS = (1, 5, 20)  # epochs

# Each figure is a sum over a count: its unit is that of docs/metrics.md.
FIGURES = (
    "corrupted_share",
    "drawn_corrupted_share",
    "right_share",
    "drawn_right_share",
    *(f"repeated_{window}_share" for window in _WINDOWS),
    "rank_overlap",
    "loading_seconds",
    "scoring_seconds",
    "scoring_time_share",
)


class SelectionReport:
    """Counts over the steps since the last log and over the whole run.

    Args:
        index: Rows by example id, 2 bytes of memory each; None where the data set can't tell its ids: repeats aren't
            counted then.
        settings: What the saved report names as its settings.

    Attributes:
        counts: Steps served, examples drawn and examples chosen by this process, over the whole run.
    """

    def __init__(self, index: IdIndex | None, settings: Mapping[str, Any]) -> None:
        self.index = index
        self.settings = dict(settings)
        self.counts = {"steps": 0, "examples_drawn": 0, "examples_chosen": 0}
        # The epoch in which a row was last chosen, -1 for never.
        self.last_epoch = np.full(len(index) if index is not None else 0, -1, dtype=np.int16)
        self._run = np.zeros((len(FIGURES), 2))
        self._window = np.zeros((len(FIGURES), 2))

    def add(self, figure: str, total: float, count: float) -> None:
        """Adds to a figure's sum and to the count that it is divided by."""
        self._window[FIGURES.index(figure)] += total, count

    def add_selection(self, outcome: Outcome, epoch: int, others: Sequence[np.ndarray] = ()) -> None:
        """Counts what was chosen, and notes that it has been now.

        Args:
            outcome: Of one selection by this process.
            epoch: Whole epochs before this one.
            others: Ids [k] that each other process has chosen at the same time.
        """
        ids = outcome.ids
        self.counts["examples_drawn"] += outcome.drawn
        self.counts["examples_chosen"] += len(ids)
        for name, (drawn, chosen) in outcome.shares.items():
            self.add(name, float(chosen.sum()), len(chosen))
            self.add(f"drawn_{name}", float(drawn.sum()), len(drawn))
        if others:
            self.add("rank_overlap", float(np.isin(ids, np.concatenate(others)).sum()), len(ids))
        if self.index is None:
            return
        rows = self.index.rows(ids)
        last = self.last_epoch[rows]
        for window in _WINDOWS:
            repeated = (last >= 0) & (epoch - last <= window)
            self.add(f"repeated_{window}_share", float(repeated.sum()), len(ids))
        now = min(epoch, np.iinfo(np.int16).max)
        self.last_epoch[rows] = now
        for other in others:
            self.last_epoch[self.index.rows(other)] = now

    def add_seconds(self, loading: float, scoring: float) -> None:
        """Counts the seconds that one selection took, for loading its rows and for scoring and choosing."""
        for figure, seconds in (("loading_seconds", loading), ("scoring_seconds", scoring)):
            self.add(figure, seconds, 0)
        self.add("scoring_time_share", scoring, 0)

    def add_step(self, seconds: float) -> None:
        """Counts an optimizer step, selection included."""
        self.counts["steps"] += 1
        self.add("loading_seconds", 0, 1)
        self.add("scoring_seconds", 0, 1)
        self.add("scoring_time_share", 0, seconds)

    def end_window(self) -> np.ndarray:
        """Ends the steps since the last log: [figures, 2] sums and counts, for `means`."""
        window, self._window = self._window, np.zeros_like(self._window)
        self._run += window
        return window

    def totals(self, device: torch.device) -> tuple[np.ndarray, dict[str, int]]:
        """Sums and counts [figures, 2] of all processes over the whole run, and `counts` of all.

        All processes must call it.
        """
        sums = sum_over_processes(self._run + self._window, device)
        numbers = sum_over_processes(np.array(list(self.counts.values()), dtype=np.float64), device)
        counts = dict(zip(self.counts, map(int, numbers), strict=True))
        return sums, {**counts, "steps": self.counts["steps"]}

    def load(self, folder: Path, first: bool) -> None:
        """Goes on from a saved report's counts.

        Args:
            folder: Where `save_report` wrote one.
            first: Whether this is the first process, which takes over what all had counted.
        """
        saved = json.loads((folder / REPORT_NAME).read_text())
        self.counts = {name: saved[name] if first or name == "steps" else 0 for name in self.counts}
        sums = [saved["sums"].get(figure, (0.0, 0.0)) for figure in FIGURES]
        self._run = np.array(sums) if first else np.zeros((len(FIGURES), 2))
        self._window = np.zeros((len(FIGURES), 2))

    def save_history(self, folder: Path) -> None:
        """Writes when each row was last chosen."""
        save_file({"last_epoch": torch.from_numpy(self.last_epoch)}, folder / _HISTORY)

    def load_history(self, folder: Path) -> None:
        """Reads what `save_history` wrote."""
        self.last_epoch = load_file(folder / _HISTORY)["last_epoch"].numpy()


def means(sums: np.ndarray) -> dict[str, float]:
    """Figures by name from [figures, 2] sums and counts; those without a count are left out."""
    return {name: float(total / count) for name, (total, count) in zip(FIGURES, sums, strict=True) if count}


def save_report(folder: Path, settings: Mapping[str, Any], sums: np.ndarray, counts: Mapping[str, int]) -> None:
    """Writes selection_report.json: settings, counts, figures, and the sums behind them.

    Args:
        folder: Where it is written.
        settings: The selection's.
        sums: [figures, 2], of all processes.
        counts: As `SelectionReport.counts`, of all processes.
    """
    content = {
        "settings": dict(settings),
        **counts,
        **means(sums),
        "sums": {name: pair for name, pair in zip(FIGURES, sums.tolist(), strict=True) if any(pair)},
    }
    write_atomically(folder / REPORT_NAME, json.dumps(content, indent=2) + "\n")


class SelectionMetrics(TrainerCallback):
    """Hands the figures of all processes to the next training log, and saves the report at the end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.announced_step != state.global_step:
            raise ValueError(
                f"nothing was chosen for step {state.global_step}: get_batch_samples of {type(self.trainer).__name__} "
                f"doesn't call super().get_batch_samples, where selection sits. Call it, or leave the method out."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        report = self.trainer.selection_report
        if report is not None:
            report.add_step(time.perf_counter() - self.trainer._step_started)
        # The summary shows what the last log doesn't.
        self._log(control.should_log or control.should_training_stop)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log(control.should_log)

    def _log(self, now: bool) -> None:
        report = self.trainer.selection_report
        if now and report is not None:
            sums = sum_over_processes(report.end_window(), self.trainer.args.device)
            self.trainer.add_metrics({f"rho_loss/{name}": value for name, value in means(sums).items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.selection_report is not None:
            self.trainer.save_selection_report(str(args.output_dir))
