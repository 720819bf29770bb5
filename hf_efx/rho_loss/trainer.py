"""RHOLossTrainer: draws more than it trains on, and chooses what to train on by reducible loss.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137, algorithm 1. The choice is made in `get_batch_samples`, so that accumulation, token counts, mixed
precision, DDP, evaluation and resuming stay the Trainer's own.
"""

import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx.core.data.example_ids import ID_COLUMN, IdIndex
from hf_efx.core.scoring.losses import per_example_loss
from hf_efx.core.scoring.scorer import Scorer, base_model, infer_task
from hf_efx.core.training.step_context import derive_seed
from hf_efx.core.training.trainer import EfxTrainerMixin
from hf_efx.rho_loss.checks import check_arguments, check_columns, check_options
from hf_efx.rho_loss.exchange import gather_equal, sum_over_processes
from hf_efx.rho_loss.irreducible_table import IrreducibleLosses
from hf_efx.rho_loss.loader import ColumnRows, ExtraColumnsCollator, can_fetch_columns
from hf_efx.rho_loss.pending import load_pending, save_pending
from hf_efx.rho_loss.report import REPORT_NAME, SelectionReport, means, save_report
from hf_efx.rho_loss.scoring_model import ScoringModelTraining
from hf_efx.rho_loss.selecting import WEIGHT, ExampleSelector, MicroBatch, Outcome, TokenSelector
from hf_efx.rho_loss.selection import get_selection_function

logger = logging.getLogger(__name__)

_Base = Trainer if TYPE_CHECKING else object

_FOLDER, _HISTORY = "rho_loss", "history.safetensors"  # in a checkpoint


class RHOLossMixin(EfxTrainerMixin, _Base):
    """Data selection over any Trainer class.

        class RHOLossSFTTrainer(RHOLossMixin, SFTTrainer): ...

    The training set needs a column `example_id` (`add_example_ids`, before any map).

    Args:
        *args: As for the Trainer.
        irreducible_losses: The table of `compute_irreducible_losses`, for the selections that read it.
        scoring_model: A model that scores in the trained one's place, for its smaller cost; on the same columns.
        **kwargs: As for the Trainer.

    Raises:
        ValueError: Before any work, if options, data set, table and model don't belong together.
    """

    extra_columns = (ID_COLUMN,)

    def __init__(
        self,
        *args: Any,
        irreducible_losses: Dataset | IrreducibleLosses | None = None,
        scoring_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        options: Any = self.args
        self.selection_function = get_selection_function(options.selection)
        if isinstance(irreducible_losses, Dataset):
            irreducible_losses = IrreducibleLosses(irreducible_losses)
        self.irreducible_losses: IrreducibleLosses | None = irreducible_losses
        self.scoring_model = None if scoring_model is None else scoring_model.to(self.args.device)
        if options.corrupted_column is not None:
            self.extra_columns = (ID_COLUMN, options.corrupted_column)
        self.selection_report: SelectionReport | None = None
        self._selector: ExampleSelector | TokenSelector | None = None
        self._scoring_training: ScoringModelTraining | None = None
        self._pending: list[MicroBatch] = []  # of steps to come
        self._already_drawn = 0  # batches that a resumed run's loader hands out once more
        self._checked: tuple[Any, IdIndex | None] = (None, None)  # the training set found to be right; its ids
        self._step_started = 0.0
        check_options(self, self.selection_function, irreducible_losses is not None, scoring_model is not None)
        self._rows_to_draw(self.args.train_batch_size)
        if self.train_dataset is not None:
            self._check_train_dataset()
        if options.report_selection:
            self.add_callback(_SelectionMetrics(self))

    @property
    def _selects(self) -> bool:
        return self.args.selection_ratio < 1  # pyright: ignore[reportAttributeAccessIssue]

    def _check_train_dataset(self) -> IdIndex | None:
        """Refuses a training set without ids, or another one than the table's; gives its rows by id."""
        data: Any = self.train_dataset
        if data is self._checked[0]:
            return self._checked[1]
        options: Any = self.args
        index = check_columns(data, self.extra_columns)
        if self.irreducible_losses is not None and self.selection_function.needs_irreducible_loss:
            self.irreducible_losses.check(
                data,
                task=self._task(),
                granularity=options.granularity,
                label_smoothing=options.label_smoothing_factor,
                tokenizer=self.processing_class,
            )
            index = self.irreducible_losses.index
        self._checked = (data, index)
        return index

    def _task(self) -> Any:
        return self.args.scoring_task or infer_task(self._scores_with)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _scores_with(self) -> nn.Module:
        return self.model if self.scoring_model is None else self.scoring_model  # pyright: ignore[reportReturnType]

    # --- drawing

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        if not is_training:
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=False, **kwargs)
        options: Any = self.args
        index = self._check_train_dataset()
        self._pending, self._already_drawn = [], 0
        if options.report_selection:
            names = ("selection", "selection_ratio", "granularity", "selection_scope", "score_mode", "rescore_every")
            self.selection_report = SelectionReport(index, {name: getattr(options, name) for name in names})
        drawn = self._rows_to_draw(batch_size)
        self._selector = self._make_selector(batch_size, drawn)
        if options.train_scoring_model and self._selects:
            assert self.scoring_model is not None
            self._scoring_training = ScoringModelTraining(self.scoring_model, self.args)
        collator = self.data_collator
        self.data_collator = ExtraColumnsCollator(collator, self.extra_columns)
        try:
            return super()._get_dataloader(dataset, description, drawn, *args, is_training=True, **kwargs)
        finally:
            self.data_collator = collator

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        dataset = super()._remove_unused_columns(dataset, description)
        collator = self.data_collator
        if isinstance(collator, ExtraColumnsCollator) and can_fetch_columns(dataset, collator.collator):
            return ColumnRows(dataset)
        return dataset

    def _rows_to_draw(self, batch_size: int) -> int:
        """n_B, shared out over the steps that one draw serves."""
        options: Any = self.args
        if options.granularity == "token" or not self._selects:
            return batch_size
        drawn = round(batch_size / options.selection_ratio / options.rescore_every)
        if drawn <= batch_size:
            raise ValueError(
                f"selection_ratio={options.selection_ratio} and rescore_every={options.rescore_every} draw {drawn} "
                f"rows to choose per_device_train_batch_size={batch_size} from: lower one of the first two."
            )
        return drawn

    def _make_selector(self, chosen: int, drawn: int) -> ExampleSelector | TokenSelector | None:
        options: Any = self.args
        if not self._selects:
            return None
        function = self.selection_function
        by_token = options.granularity == "token"
        quantities = set(function.quantities)
        if quantities or by_token:
            quantities |= {"count"}
            if options.report_selection and self._task() != "regression":
                quantities |= {"correct"}
        scorer = Scorer(
            sorted(quantities),
            task=options.scoring_task,
            granularity=options.granularity,
            label_smoothing=options.label_smoothing_factor,
            mode=options.score_mode,
            precision=options.scoring_precision,
            batch_size=options.scoring_batch_size,
            mc_samples=options.mc_samples,
        )
        table = self.irreducible_losses if function.needs_irreducible_loss else None
        corrupted = options.corrupted_column if options.report_selection else None
        if by_token:
            return TokenSelector(function, scorer, self._task(), table, options.selection_ratio, corrupted)
        together = options.selection_scope == "global"
        return ExampleSelector(
            function,
            scorer if quantities else None,
            self._task() if table is not None else None,
            table,
            chosen,
            drawn,
            corrupted,
            padding=self._padding(),
            side=getattr(self.processing_class, "padding_side", "right"),
            world_size=self.args.world_size if together else 1,
            rank=self.args.process_index if together else 0,
        )

    def _padding(self) -> dict[str, float]:
        """What fills the columns of rows of unequal width, which come together from several draws."""
        token = self._pad_token_id()
        return {"input_ids": token, "decoder_input_ids": token, "decoder_attention_mask": 0, "position_ids": 0}

    def _pad_token_id(self) -> int:
        config = getattr(base_model(self.model), "config", None)  # pyright: ignore[reportArgumentType]
        for source in (self.processing_class, getattr(self.processing_class, "tokenizer", None), config):
            token = getattr(source, "pad_token_id", None)
            if token is not None:
                return token
        return 0

    # --- choosing

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Draws, scores and chooses one optimizer step's micro-batches.

        The rows are chosen over all draws of the step together (gradient accumulation is one large batch), and over
        those of the next steps too where `rescore_every` is above 1.
        """
        self._step_started = time.perf_counter()
        for _ in range(self._already_drawn):
            next(epoch_iterator, None)
        self._already_drawn = 0
        if self._selector is None:
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            chosen = self._take_whole(batches)
        else:
            if not self._pending:
                self._pending = self._choose(epoch_iterator, num_batches)
            chosen, self._pending = self._pending[:num_batches], self._pending[num_batches:]
            batches = [part.batch for part in chosen]
            count = self._get_num_items_in_batch(batches, device)
        if chosen:
            self._announce(chosen)
        return batches, count

    def _choose(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[MicroBatch]:
        """Scores and chooses among the draws of this step, or of a cycle that doesn't cross the epoch's end."""
        assert self._selector is not None
        options: Any = self.args
        drawn = list(itertools.islice(epoch_iterator, num_batches * options.rescore_every))
        if not drawn:
            return []
        loaded = time.perf_counter()
        rank = self.args.process_index if options.selection_scope == "process" else None
        seed = derive_seed(self.args.seed, self.state.global_step, 0, rank, "rho_loss")
        outcome = self._selector(self._scores_with, drawn, torch.Generator().manual_seed(seed))
        self._report(outcome, loaded - self._step_started, time.perf_counter() - loaded)
        return outcome.micro_batches

    def _take_whole(self, batches: list[Any]) -> list[MicroBatch]:
        """Nothing is chosen: all that was drawn is trained on, as it is."""
        ids = [batch[ID_COLUMN].reshape(-1).cpu() for batch in batches]
        chosen = [MicroBatch(b, i, torch.full(i.shape, torch.nan)) for b, i in zip(batches, ids, strict=True)]
        if chosen and self.selection_report is not None:
            outcome = Outcome(chosen, sum(map(len, ids)))
            column = self.args.corrupted_column  # pyright: ignore[reportAttributeAccessIssue]
            if column is not None:
                values = torch.cat([batch[column].reshape(-1) for batch in batches]).cpu().numpy()
                outcome.shares["corrupted_share"] = (values, values)
            self._report(outcome, time.perf_counter() - self._step_started, 0.0)
        return chosen

    def _report(self, outcome: Outcome, loading: float, scoring: float) -> None:
        if self.selection_report is None:
            return
        others = []
        if self.args.world_size > 1:
            ids = gather_equal(torch.from_numpy(outcome.ids).to(self.args.device)).cpu().numpy()
            others = [other for rank, other in enumerate(ids) if rank != self.args.process_index]
        self.selection_report.add_selection(outcome, int(self.state.epoch or 0), others)
        self.selection_report.add_seconds(loading, scoring)

    def _announce(self, chosen: list[MicroBatch]) -> None:
        step = self.state.global_step
        self.on_selection(step, torch.cat([part.ids for part in chosen]), torch.cat([part.scores for part in chosen]))
        if self._scoring_training is not None:
            hidden = {*self.extra_columns, WEIGHT}
            inputs = [{name: value for name, value in part.batch.items() if name not in hidden} for part in chosen]
            self._scoring_training.step(inputs, self._get_learning_rate(), step)

    def on_selection(self, step: int, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Called before each optimizer step with what this process trains on in it; does nothing.

        Args:
            step: Optimizer step, from 0.
            ids: int64 [k] on the CPU, in the order trained, all micro-batches together.
            scores: float32 [k] on the CPU; NaN where nothing was scored. By token, the mean over the chosen tokens.
        """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss; the weighted mean of the examples' losses where the selection samples with weights."""
        weights = inputs.pop(WEIGHT, None)
        if weights is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        options: Any = self.args
        outputs = model(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        losses, _ = per_example_loss(
            logits, inputs["labels"], self._task(), label_smoothing=options.label_smoothing_factor
        )
        loss = (weights.to(losses.device) * losses).mean()
        # The Trainer takes a loss of a model that is given the count for scaled already (`training_step`).
        if (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    # --- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        first = self.is_world_process_zero()
        folder = Path(output_dir, _FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        save_pending(folder, self._pending, self.args.process_index)
        if self._scoring_training is not None and first:
            self._scoring_training.save(folder)
        if self.selection_report is not None:
            self.save_selection_report(output_dir)
            if first:
                save_file({"last_epoch": torch.from_numpy(self.selection_report.last_epoch)}, folder / _HISTORY)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint, _FOLDER)
        self._pending = load_pending(folder, self.args.process_index, self.args.world_size, self.args.device)
        if not self.args.ignore_data_skip:
            self._already_drawn = len(self._pending)  # the Trainer skips what was trained on; this was drawn beyond
        if self._scoring_training is not None:
            self._scoring_training.load(folder)
        if self.selection_report is not None and Path(checkpoint, REPORT_NAME).is_file():
            self.selection_report.load(Path(checkpoint), self.is_world_process_zero())
            self.selection_report.last_epoch = load_file(folder / _HISTORY)["last_epoch"].numpy()

    def save_selection_report(self, folder: str) -> None:
        """Writes what was chosen so far, by all processes, as selection_report.json; all processes must call it."""
        assert self.selection_report is not None, "report_selection=False"
        sums, counts = self.selection_report.totals(self.args.device)
        if self.is_world_process_zero():
            save_report(Path(folder), self.selection_report.settings, sums, counts)


class RHOLossTrainer(RHOLossMixin, Trainer):
    """`transformers.Trainer` that chooses what it trains on; see `RHOLossMixin`."""


class _SelectionMetrics(TrainerCallback):
    """Hands the figures of all processes to the next training log, and saves the report at the end."""

    def __init__(self, trainer: RHOLossMixin) -> None:
        self.trainer = trainer

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
