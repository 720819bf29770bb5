"""The program behind `scripts/compute_irreducible_losses.py`: a table of irreducible losses, saved and pushed.

    python scripts/compute_irreducible_losses.py --label_noise 0.1 --push_table_to you/irreducible-losses
    python scripts/compute_irreducible_losses.py --irreducible cross_fit --irreducible_folds 4

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_efx.core.training.arguments import EfxArguments
from hf_efx.programs.command_line import OptionParser
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_run import end_processes, program_defaults, set_up_logging
from hf_efx.programs.tasks import TaskModelOptions, TaskOptions
from hf_efx.rho_loss.irreducible_run import (
    IrreducibleOptions,
    how_made,
    make_irreducible_losses,
    with_holdout_share,
)
from hf_efx.rho_loss.irreducible_table import push_irreducible_losses, save_irreducible_losses


@dataclass
class TableOptions:
    """What becomes of the table."""

    granularity: str = field(
        default="example",
        metadata={"help": "'token' keeps a loss for each token of a causal model: larger, and for selecting tokens."},
    )
    push_table_to: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub that the table is pushed to, with its card and histogram."},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Makes a table of irreducible losses, saves it in the output folder and, if asked, pushes it.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = (TaskModelOptions, TaskOptions, IrreducibleOptions, TableOptions, EfxArguments)
    parser = OptionParser(options, None, "compute_irreducible_losses.py", "Computes irreducible losses.")
    parser.set_defaults(**program_defaults(), output_dir="runs/irreducible_losses")
    model_options, task_options, irreducible, table_options, args = parser.read(argv)
    set_up_logging(args)
    try:
        if irreducible.irreducible_losses:
            raise ValueError("irreducible_losses names a ready table, but this program makes one: leave it out.")
        task_options = with_holdout_share(task_options, irreducible.irreducible)
        with args.main_process_first(desc="loading the data"):
            task = load_task(task_options, model_options.model_name_or_path)
        table, seconds = make_irreducible_losses(task, irreducible, args, table_options.granularity)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    if args.process_index == 0:
        folder = save_irreducible_losses(table, Path(str(args.output_dir), "table"))
        print(f"{how_made(table)}\n{seconds:.1f} s, table: {folder}")
        if table_options.push_table_to:
            print(f"pushed: {push_irreducible_losses(table, table_options.push_table_to).commit_url}")
    end_processes()
    return 0
