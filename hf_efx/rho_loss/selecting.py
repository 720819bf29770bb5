"""One selection: from the batches that were drawn to the micro-batches that are trained on.

`ExampleSelector` is the paper's algorithm 1, lines 5 to 8: score the large batch, take the best rows. `TokenSelector`
does the same to the tokens of an ordinary batch. Neither trains; neither knows the Trainer, whose options
`make_selector` reads.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hf_efx.core.data.example_ids import ID_COLUMN
from hf_efx.core.scoring.batches import Batch, check_rows
from hf_efx.core.scoring.losses import IGNORE_INDEX, Task, aligned_labels
from hf_efx.core.scoring.scorer import Precision, Scorer, bf16_is_faster
from hf_efx.core.scoring.scoring_state import base_model
from hf_efx.rho_loss.exchange import exchange_rows, gather_equal, sum_over_processes, union_order
from hf_efx.rho_loss.irreducible_table import IrreducibleLosses
from hf_efx.rho_loss.loader import MicroBatch, cut_rows, gather_rows, split_evenly
from hf_efx.rho_loss.selection import IRREDUCIBLE_LOSS, SelectionFunction, select_examples, select_tokens

logger = logging.getLogger(__name__)

# A column that a micro-batch carries where rows are weighted; `RHOLossMixin.compute_loss` takes it off.
WEIGHT = "selection_weight"
Places = tuple[torch.Tensor, torch.Tensor]  # of `union_order`


@dataclass
class Outcome:
    """What a selection chose.

    Attributes:
        micro_batches: What this process trains on, in order.
        drawn: Examples drawn by this process.
        shares: For the report: by name, values of all that was drawn and of what was chosen (examples, or tokens).
    """

    micro_batches: list[MicroBatch]
    drawn: int
    shares: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def ids(self) -> np.ndarray:
        """[k] int64, what this process trains on, in that order."""
        return torch.cat([part.ids for part in self.micro_batches]).numpy()


def take_all(batches: Sequence[Batch], corrupted_column: str | None) -> Outcome:
    """Chooses nothing: all that was drawn is trained on, as it is."""
    ids = [batch[ID_COLUMN].reshape(-1).cpu() for batch in batches]
    whole = [MicroBatch(b, i, torch.full(i.shape, torch.nan)) for b, i in zip(batches, ids, strict=True)]
    shares = {}
    if corrupted_column is not None and whole:
        values = torch.cat([batch[corrupted_column].reshape(-1) for batch in batches]).cpu().numpy()
        shares["corrupted_share"] = (values, values)
    return Outcome(whole, sum(map(len, ids)), shares)


@dataclass
class ExampleSelector:
    """Chooses the rows of a draw with the highest scores.

    Attributes:
        function: What scores them.
        scorer: What computes the quantities that the function needs, None where it needs none.
        task: What the labels mean, None where they aren't looked at.
        table: Irreducible losses, None where the function needs none.
        chosen: Rows trained on out of `drawn` rows drawn; a shorter draw gives as many in proportion, one at least.
        drawn: See `chosen`.
        corrupted_column: Column of the report.
        padding: What fills a name's columns where rows of unequal width come together.
        side: Where it goes.
        world_size: Processes to choose over, 1 where each chooses for itself.
        rank: This process among them.
    """

    function: SelectionFunction
    scorer: Scorer | None
    task: Task | None
    table: IrreducibleLosses | None
    chosen: int
    drawn: int
    corrupted_column: str | None = None
    padding: Mapping[str, float] = field(default_factory=dict)
    side: Literal["left", "right"] = "right"
    world_size: int = 1
    rank: int = 0

    def __call__(self, model: nn.Module, batches: Sequence[Batch], generator: torch.Generator) -> Outcome:
        """Scores the rows and chooses among all of them, whichever batch they came in.

        Args:
            model: What scores.
            batches: As the loader gave them, `example_id` [n] among their columns.
            generator: For what is random; the same in all processes that choose together.

        Raises:
            ValueError: For a score that can't be ranked; an id that the table doesn't have.
        """
        sizes = [_examples(batch) for batch in batches]
        places = union_order(sizes, self.world_size)
        own = self._columns(batches)
        names, values = self._values(model, batches, own[0])
        known, values = self._of_all(own, places, batches), self._of_all(values, places, batches)
        by_name = dict(zip(names, values, strict=True))
        scores = self._scores(by_name)
        count = sum(max(1, size * self.chosen // self.drawn) for size in sizes)
        rows, weights = select_examples(
            scores, count * self.world_size, ids=known[0], generator=generator, sampled=self.function.sampled
        )
        parts = split_evenly(count, len(batches))
        mine = self._mine(parts)
        batch = self._fetched(batches, rows, mine, places)
        rows = rows[mine]
        if weights is not None:
            batch[WEIGHT] = weights[mine].to(batch[ID_COLUMN].device)
        chosen_scores = torch.full((len(rows),), torch.nan) if scores is None else scores[rows].float()
        pieces = zip(cut_rows(batch, parts), known[0][rows].split(parts), chosen_scores.split(parts), strict=True)
        return Outcome([MicroBatch(*piece) for piece in pieces], sum(sizes), self._shares(by_name, known, rows))

    def _of_all(self, values: torch.Tensor, places: Places, batches: Sequence[Batch]) -> torch.Tensor:
        """[values, n] of this process to those of all that choose together, in the order of one process' draw."""
        if self.world_size == 1 or not len(values):
            return values
        rank_of, row_of = places
        return gather_equal(values.to(batches[0][ID_COLUMN].device)).cpu()[rank_of, :, row_of].T

    def _mine(self, parts: Sequence[int]) -> torch.Tensor:
        """Which of the chosen rows this process trains on.

        Each micro-batch of one process with the whole batch is dealt out to the processes in order.
        """
        starts = np.cumsum([0, *parts[:-1]]) * self.world_size
        return torch.cat([s + self.rank * p + torch.arange(p) for s, p in zip(starts, parts, strict=True)])

    def _fetched(
        self, batches: Sequence[Batch], rows: torch.Tensor, mine: torch.Tensor, places: Places
    ) -> dict[str, Any]:
        """The rows that this process trains on, wherever they were drawn."""
        take = functools.partial(gather_rows, batches, padding=self.padding, side=self.side)
        if self.world_size == 1:
            return take(rows)
        rank_of, row_of = places
        return exchange_rows(take, rank_of[rows], row_of[rows], mine, self.rank, self.padding, self.side)

    def _columns(self, batches: Sequence[Batch]) -> torch.Tensor:
        """[columns, n] int64 on the CPU: the ids first. The one wait for the device before scoring."""
        names = [ID_COLUMN, *([self.corrupted_column] if self.corrupted_column else [])]
        return torch.stack(
            [torch.cat([batch[name].reshape(-1).to(torch.int64) for batch in batches]) for name in names]
        ).cpu()

    def _values(self, model: nn.Module, batches: Sequence[Batch], ids: torch.Tensor) -> tuple[list[str], torch.Tensor]:
        """Names and float32 [values, n] on the CPU of all that is known of each row."""
        results: dict[str, torch.Tensor] = {}
        if self.scorer is not None:
            scored = [self.scorer(model, _model_columns(batch, self.corrupted_column)) for batch in batches]
            names = self.scorer.quantities
            # One copy from the device for all quantities.
            stacked = torch.stack([torch.cat([part[name].float() for part in scored]) for name in names]).cpu()
            results = dict(zip(names, stacked, strict=True))
        elif self.table is not None and self.task is not None:
            results["count"] = torch.cat([_label_counts(batch, self.task) for batch in batches]).float().cpu()
        if self.table is not None:
            results[IRREDUCIBLE_LOSS] = self.table.lookup(ids)
        return list(results), torch.stack(list(results.values())) if results else torch.empty(0, len(ids))

    def _scores(self, values: dict[str, torch.Tensor]) -> torch.Tensor | None:
        scores = self.function.score(values)
        if scores is not None and "count" in values:
            # Nothing to learn from: chosen only where nothing else is left.
            scores = scores.masked_fill(values["count"] == 0, -torch.inf)
        return scores

    def _shares(
        self, values: dict[str, torch.Tensor], known: torch.Tensor, rows: torch.Tensor
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        shares = {"right_share": values.get("correct"), "corrupted_share": known[1] if len(known) > 1 else None}
        return {name: (v.numpy(), v[rows].numpy()) for name, v in shares.items() if v is not None}


@dataclass
class TokenSelector:
    """Leaves all but the highest-scoring tokens of the batches out of the loss.

    Attributes:
        function: What scores tokens.
        scorer: Computes its quantities by token.
        task: What the labels mean.
        table: Irreducible losses by token, None where the function needs none.
        ratio: Share of the valid tokens that is kept, over all batches together.
        corrupted_column: Column of the report: a token is corrupted if its example is.
    """

    function: SelectionFunction
    scorer: Scorer
    task: Task
    table: IrreducibleLosses | None
    ratio: float
    corrupted_column: str | None = None

    def __call__(self, model: Any, batches: Sequence[Batch], generator: torch.Generator) -> Outcome:
        """Scores the tokens and sets the labels of those not chosen to -100.

        Args:
            model: What scores.
            batches: As the loader gave them.
            generator: For what is random.

        Raises:
            ValueError: For a score that can't be ranked; a table whose tokens don't fit an example's.
        """
        scored = [self._score(model, batch, generator) for batch in batches]
        flat = [torch.cat([part[name].flatten() for part in scored]) for name in ("score", "mask")]
        keep = select_tokens(flat[0][None], flat[1][None], self.ratio)[0]
        kept = keep.split([part["mask"].numel() for part in scored])
        results = []
        for batch, part, chosen in zip(batches, scored, kept, strict=True):
            chosen = chosen.reshape(part["mask"].shape)
            mean = part["score"].masked_fill(~chosen, 0).sum(1) / chosen.sum(1).clamp(min=1)
            ids = batch[ID_COLUMN].reshape(-1).cpu()
            results.append(MicroBatch(self._masked(model, batch, chosen), ids, mean.float().cpu()))
        drawn = sum(len(part.ids) for part in results)
        return Outcome(results, drawn, self._shares(batches, scored, flat[1], keep))

    def _score(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        _examples(batch)
        values = self.scorer(model, _model_columns(batch, self.corrupted_column))
        mask = values["mask"]
        if self.table is not None:
            values[IRREDUCIBLE_LOSS] = self.table.lookup(batch[ID_COLUMN].reshape(-1), mask)
        score = self.function.score(values)
        if score is None:
            score = torch.rand(mask.shape, generator=generator).to(mask.device)
        return {**values, "score": score, "mask": mask}

    def _masked(self, model: Any, batch: Batch, chosen: torch.Tensor) -> dict[str, Any]:
        result = dict(batch)
        labels = batch["labels"]
        if self.task == "seq2seq" and "decoder_input_ids" not in batch:
            # The decoder reads the labels, left-out ones too.
            result["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        if self.task == "causal":  # entry t is about label t + 1
            chosen = torch.nn.functional.pad(chosen[:, :-1], (1, 0), value=False)
        result["labels"] = labels.masked_fill(~chosen.to(labels.device), IGNORE_INDEX)
        return result

    def _shares(
        self,
        batches: Sequence[Batch],
        scored: Sequence[Mapping[str, torch.Tensor]],
        mask: torch.Tensor,
        keep: torch.Tensor,
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        values = {}
        if "correct" in scored[0]:
            values["right_share"] = torch.cat([part["correct"].flatten() for part in scored])
        if self.corrupted_column:
            columns = [batch[self.corrupted_column].reshape(-1, 1) for batch in batches]
            values["corrupted_share"] = torch.cat(
                [
                    c.to(part["mask"].device).expand_as(part["mask"]).flatten()
                    for c, part in zip(columns, scored, strict=True)
                ]
            )
        return {name: (v[mask].cpu().numpy(), v[keep].cpu().numpy()) for name, v in values.items()}


def make_selector(trainer: Any, chosen: int, drawn: int) -> ExampleSelector | TokenSelector:
    """The selector that a `RHOLossMixin`'s options ask for.

    Args:
        trainer: With `args`, `selection_function`, `irreducible_losses` and `scored_task`.
        chosen: Rows of a micro-batch that are trained on.
        drawn: Rows that they are chosen from.
    """
    options, function = trainer.args, trainer.selection_function
    scorer = _make_scorer(trainer)
    table = trainer.irreducible_losses if function.needs_irreducible_loss else None
    corrupted = options.corrupted_column if options.report_selection else None
    if options.granularity == "token":
        return TokenSelector(function, scorer, trainer.scored_task(), table, options.selection_ratio, corrupted)
    together = options.selection_scope == "global"
    return ExampleSelector(
        function,
        scorer if scorer.quantities else None,
        trainer.scored_task() if table is not None else None,
        table,
        chosen,
        drawn,
        corrupted,
        padding=_padding(trainer),
        side=getattr(trainer.processing_class, "padding_side", "right"),
        world_size=options.world_size if together else 1,
        rank=options.process_index if together else 0,
    )


def _make_scorer(trainer: Any) -> Scorer:
    """What computes the quantities that the selection reads, and those of the report."""
    options = trainer.args
    quantities = set(trainer.selection_function.quantities)
    if quantities or options.granularity == "token":
        quantities |= {"count"}
        if options.report_selection and trainer.scored_task() != "regression":
            quantities |= {"correct"}
    precision = resolve_precision(options)
    if options.scoring_precision == "auto":
        found = "as in training, since bf16 is no faster here" if precision is None else precision
        logger.info("scoring_precision='auto': %s.", found)
    return Scorer(
        sorted(quantities),
        task=options.scoring_task,
        granularity=options.granularity,
        label_smoothing=options.label_smoothing_factor,
        mode=options.score_mode,
        precision=precision,
        batch_size=options.scoring_batch_size,
        mc_samples=options.mc_samples,
    )


def resolve_precision(options: Any) -> Precision | None:
    """What scores are computed in; `"auto"` takes what the device is faster in, the same on all processes."""
    if options.scoring_precision != "auto":
        return None if options.scoring_precision == "training" else options.scoring_precision
    faster = sum_over_processes(np.array([float(bf16_is_faster(options.device))]), options.device)[0]
    return "bf16" if faster == options.world_size else None


def _padding(trainer: Any) -> dict[str, float]:
    """What fills the columns of rows of unequal width, which come together from several draws."""
    config = getattr(base_model(trainer.model), "config", None)
    sources = (trainer.processing_class, getattr(trainer.processing_class, "tokenizer", None), config)
    tokens = (getattr(source, "pad_token_id", None) for source in sources)
    token = next((token for token in tokens if token is not None), 0)
    return {"input_ids": token, "decoder_input_ids": token, "decoder_attention_mask": 0, "position_ids": 0}


def _examples(batch: Batch) -> int:
    """The number of a batch's examples, each of which has a row of its own."""
    count = batch[ID_COLUMN].numel()
    check_rows({name: value for name, value in batch.items() if name != ID_COLUMN}, count)
    return count


def _model_columns(batch: Batch, corrupted_column: str | None) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in (ID_COLUMN, corrupted_column)}


def _label_counts(batch: Batch, task: Task) -> torch.Tensor:
    labels = batch["labels"]
    if task == "regression":
        return torch.ones(len(labels), device=labels.device)
    return (aligned_labels(labels, task) != IGNORE_INDEX).reshape(len(labels), -1).sum(1)
