"""The runs of a study, several at a time, each in a process of its own on one thread."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run: `configuration` and `seed` name its row, `steps` is for the bar, the rest goes to the function."""

    configuration: str
    seed: int
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)


def run_all(
    function: Callable[..., dict[str, Any]], jobs: Sequence[Job], rows: Any, workers: int, **common: Any
) -> None:
    """Runs what isn't there yet, `workers` runs at a time, with a bar over all their steps.

    Args:
        function: Called with a job, a queue that takes the steps done, and `common`; at a module's top level.
        jobs: All of them.
        rows: The StudyRows.
        workers: Processes, one thread each.
        **common: For the function.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    todo = [job for job in jobs if not rows.has((job.configuration, job.seed))]
    if not todo:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        Progress(*columns) as bar,
    ):
        queue = manager.Queue()
        task = bar.add_task("steps", total=sum(job.steps for job in todo))
        waiting = {pool.submit(function, job, queue, **common): job for job in todo}
        while waiting:
            for future in [f for f in waiting if f.done()]:
                job = waiting.pop(future)
                row = future.result()
                rows.add((job.configuration, job.seed), row)
                shown = {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
                bar.console.print(f"{job.configuration}, seed {job.seed}: {shown}")
            bar.advance(task, sum(queue.get() for _ in range(queue.qsize())))
            time.sleep(0.5)
