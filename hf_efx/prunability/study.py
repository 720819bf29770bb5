"""Which measures predict the generalization gap: trains a grid of networks, measures each, ranks the measures.

    grid = [{"width": w, "dropout": p} for w in (16, 32) for p in (0.0, 0.3)]
    study = generalization_study(grid, train)   # train(settings, seed) -> TrainedNetwork
    print(study.ranking())

All networks should be trained to one training loss: then the gap is what tells them apart. A grid of one
hyperparameter, such as the width, is a sweep (double descent), for which the rows are what counts.
"""

import contextlib
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_efx.core.results.evidence import StudyRows
from hf_efx.core.results.statistics import percentile_interval
from hf_efx.prunability.baselines import BASELINE_MEASURES, Network, baseline_measures
from hf_efx.prunability.measure import measure_prunability
from hf_efx.prunability.statistics import bootstrap_taus, conditional_mutual_information, granulated_tau, kendall_tau

FORMS: dict[str, dict[str, Any]] = {"prunability": {}}
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class TrainedNetwork:
    """What training one point of the grid gives.

    Attributes:
        network: The model, its losses and margins on training data, and what else measures need.
        figures: The gap among them (`loss_gap`, `accuracy_gap`, ...), and, where some networks may fail to reach the
            common training loss, `reached`.
    """

    network: Network
    figures: Mapping[str, float | bool]


Train = Callable[[Settings, int], TrainedNetwork]


@dataclass(frozen=True)
class GeneralizationStudy:
    """The networks of a study and what its measures are worth.

    Attributes:
        rows: One for each network: its settings, figures and measures.
        hyperparameters: The settings' names.
        measures: Their names.
        gap: The figure that the measures are to predict.
    """

    rows: list[dict[str, Any]]
    hyperparameters: tuple[str, ...]
    measures: tuple[str, ...]
    gap: str = "loss_gap"

    @property
    def compared(self) -> list[dict[str, Any]]:
        """The rows that reached the common training loss."""
        return [row for row in self.rows if row.get("reached", True)]

    def values(self, name: str) -> list[float]:
        """A figure of the compared rows; what wasn't finite ranks as the largest."""
        return [math.inf if row[name] is None else float(row[name]) for row in self.compared]

    def ranking(self, draws: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
        """One line for each measure, the best first.

        Args:
            draws: Of the bootstrap over networks.
            seed: Of that.

        Returns:
            `measure`, `tau`, its 95% interval `tau_interval`, `granulated_tau`, `granulated` (by hyperparameter) and
            `information` (conditional mutual information).
        """
        gap = self.values(self.gap)
        settings = [{name: row[name] for name in self.hyperparameters} for row in self.compared]
        defined = {name: self.values(name) for name in self.measures if len(set(self.values(name))) > 1}
        spread = bootstrap_taus(defined, gap, draws, seed)
        lines = []
        for name, values in defined.items():
            granulated = granulated_tau(values, gap, settings)
            lines.append(
                {
                    "measure": name,
                    "tau": kendall_tau(values, gap),
                    "tau_interval": percentile_interval(spread[name]),
                    "granulated_tau": granulated.pop("mean"),
                    "granulated": granulated,
                    "information": conditional_mutual_information(values, gap, settings),
                }
            )
        return sorted(lines, key=lambda line: -line["tau"])

    def difference(
        self, first: str, second: str, draws: int = 2000, seed: int = 0
    ) -> tuple[float, tuple[float, float]]:
        """Tau of one measure less that of another, and its 95% interval by a bootstrap over the same networks."""
        gap, pair = self.values(self.gap), {name: self.values(name) for name in (first, second)}
        spread = bootstrap_taus(pair, gap, draws, seed)
        taus = {name: kendall_tau(values, gap) for name, values in pair.items()}
        return taus[first] - taus[second], percentile_interval(spread[first] - spread[second])


def generalization_study(
    model_grid: Sequence[Settings],
    train: Train,
    *,
    seeds: Sequence[int] = (0,),
    gap: str = "loss_gap",
    forms: Mapping[str, Mapping[str, Any]] = FORMS,
    measures: Sequence[str] = tuple(BASELINE_MEASURES),
    rows: StudyRows | None = None,
    workers: int = 1,
    progress: bool = True,
) -> GeneralizationStudy:
    """Trains a grid of networks, measures each at its end, and compares measures by the gap that they predict.

    Args:
        model_grid: Settings of each network; all have the same names, words or numbers.
        train: Trains one network from its settings and a seed. With several workers it must be a function at a
            module's top level, or a `functools.partial` of one.
        seeds: Each point is trained with each.
        gap: Which of the figures the measures are to predict.
        forms: Ways to measure prunability: options of `measure_prunability` by name.
        measures: Out of `BASELINE_MEASURES`.
        rows: Keeps finished rows on disk, so that a killed study goes on; None keeps none.
        workers: Networks at a time, each in a process of its own on one thread; 1 trains in this process.
        progress: Whether to show a bar.

    Raises:
        ValueError: If the grid is empty or its settings have other names, or a trained network lacks the gap.
    """
    if not model_grid:
        raise ValueError("model_grid is empty: give the settings of at least one network")
    names = tuple(model_grid[0])
    if different := next((one for one in model_grid if tuple(one) != names), None):
        raise ValueError(f"model_grid: all settings need the names {names}, but one has {tuple(different)}")
    if workers < 1:
        raise ValueError(f"workers={workers}: expected 1 or more")
    with contextlib.ExitStack() as stack:
        if rows is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            rows = StudyRows(Path(folder) / "study.json", {})
        jobs = [(_name(one), seed, one) for one in model_grid for seed in seeds]
        wanted = {(name, seed) for name, seed, _ in jobs}
        todo = [job for job in jobs if not rows.has(job[:2])]
        common = (train, gap, dict(forms), list(measures))
        _run(todo, common, rows, workers, progress)
        done = [row for row in rows.rows if (row["configuration"], row["seed"]) in wanted]
    return GeneralizationStudy(done, names, (*forms, *measures), gap)


def _name(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def measure_network(
    trained: TrainedNetwork, forms: Mapping[str, Mapping[str, Any]] = FORMS, measures: Sequence[str] | None = None
) -> dict[str, float]:
    """Prunability in each form, every other measure, and the CPU seconds that one form and all others took."""
    network = trained.network
    start = time.process_time()
    row = {
        name: measure_prunability(network.model, lambda model: network.outcome(model)[0], **options).fraction
        for name, options in forms.items()
    }
    middle = time.process_time()
    row |= baseline_measures(network, None if measures is None else list(measures))
    seconds = {
        "prunability_seconds": (middle - start) / max(len(forms), 1),
        "measures_seconds": time.process_time() - middle,
    }
    return row | seconds


def _one(job: tuple[str, int, Settings], train: Train, gap: str, forms: Any, measures: Any) -> dict[str, Any]:
    """Trains and measures one network."""
    _, seed, settings = job
    trained = train(settings, seed)
    if gap not in trained.figures:
        raise ValueError(f"gap={gap!r} isn't among the figures of the network: {', '.join(trained.figures)}")
    figures = {name: float(v) if isinstance(v, np.floating) else v for name, v in trained.figures.items()}
    return {**settings, **figures, **measure_network(trained, forms, measures)}


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _run(jobs: list[Any], common: tuple[Any, ...], rows: StudyRows, workers: int, progress: bool) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar, contextlib.ExitStack() as stack:
        task = bar.add_task("networks", total=len(jobs))
        if workers == 1:
            finished = ((job, _one(job, *common)) for job in jobs)
        else:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread))
            futures = {pool.submit(_one, job, *common): job for job in jobs}
            finished = ((futures[future], future.result()) for future in as_completed(futures))
        for (name, seed, _), row in finished:
            rows.add((name, seed), row)
            bar.advance(task)
            if progress and not bar.console.is_terminal:  # where no bar shows
                bar.console.print(f"{name}, seed {seed}: {len(rows.rows)} networks")
