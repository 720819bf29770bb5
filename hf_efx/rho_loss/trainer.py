"""RHOLossTrainer: draws more than it trains on, and chooses what to train on by reducible loss.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137, algorithm 1. The choice is made in `get_batch_samples`, so that accumulation, token counts, mixed
precision, DDP, evaluation and resuming stay the Trainer's own.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_efx.core.data.example_ids import ID_COLUMN, IdIndex
from hf_efx.core.scoring.losses import per_example_loss
from hf_efx.core.scoring.scorer import infer_task
from hf_efx.core.scoring.scoring_state import random_state_kept
from hf_efx.core.training.step_context import derive_seed
from hf_efx.core.training.trainer import EfxTrainerMixin
from hf_efx.rho_loss.arguments import RHOLossArguments
from hf_efx.rho_loss.checks import (
    LossCheck,
    check_arguments,
    check_collator,
    check_options,
    check_train_dataset,
    rows_to_draw,
)
from hf_efx.rho_loss.exchange import gather_equal
from hf_efx.rho_loss.irreducible_table import IrreducibleLosses
from hf_efx.rho_loss.loader import (
    ColumnRows,
    ExtraColumnsCollator,
    MicroBatch,
    can_fetch_columns,
    load_pending,
    save_pending,
)
from hf_efx.rho_loss.report import REPORT_NAME, SelectionMetrics, SelectionReport, save_report
from hf_efx.rho_loss.selecting import WEIGHT, ExampleSelector, Outcome, TokenSelector, make_selector, take_all
from hf_efx.rho_loss.selection import get_selection_function
from hf_efx.rho_loss.side_models import ScoringModelTraining

logger = logging.getLogger(__name__)

_Base = Trainer if TYPE_CHECKING else object

_FOLDER = "rho_loss"  # in a checkpoint


class RHOLossMixin(EfxTrainerMixin, _Base):
    """Data selection over any Trainer class.

        class RHOLossSFTTrainer(RHOLossMixin, SFTTrainer): ...

    The training set needs a column `example_id` (`add_example_ids`, before any map).

    Args:
        *args: As for the Trainer.
        irreducible_losses: The table of `compute_irreducible_losses`, for the selections that read it.
        scoring_model: A model that scores in the trained one's place, for its smaller cost; on the same columns.
        **kwargs: As for the Trainer.

    Options are read when training begins: what is set on `args` later, or by a search, counts.

    Raises:
        ValueError: If options, data set, table and model don't belong together; here, and again when training begins.
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
        if isinstance(irreducible_losses, Dataset):
            irreducible_losses = IrreducibleLosses(irreducible_losses)
        self.irreducible_losses: IrreducibleLosses | None = irreducible_losses
        self.scoring_model = None if scoring_model is None else scoring_model.to(self.args.device)
        self.selection_report: SelectionReport | None = None
        self._selector: ExampleSelector | TokenSelector | None = None
        self._scoring_training: ScoringModelTraining | None = None
        self._pending: list[MicroBatch] = []  # of steps to come
        self._already_drawn = 0  # batches that a resumed run's loader hands out once more
        self._checked: tuple[Any, Any, IdIndex | None] | None = None  # a training set found right, for what; its ids
        self.announced_step = -1  # the last one whose rows were chosen
        self._step_started = 0.0
        self.read_options()
        self.add_callback(SelectionMetrics(self))

    def read_options(self) -> None:
        """Takes the options of selection as they stand on `args` now; called again when training begins.

        Raises:
            ValueError: For a value out of range, or options, data set, table and model that don't belong together.
        """
        options: Any = self.args
        options.check_selection()
        self.selection_function = get_selection_function(options.selection)
        corrupted = () if options.corrupted_column is None else (options.corrupted_column,)
        self.extra_columns = tuple(dict.fromkeys((*type(self).extra_columns, ID_COLUMN, *corrupted)))
        check_options(self, self.selection_function, self.irreducible_losses is not None)
        rows_to_draw(options, self.args.train_batch_size)
        if self.train_dataset is not None:
            self._check_train_dataset()

    @property
    def _selects(self) -> bool:
        return self.args.selection_ratio < 1  # pyright: ignore[reportAttributeAccessIssue]

    def _check_train_dataset(self) -> IdIndex | None:
        """Refuses a training set without ids, or another one than the table's; gives its rows by id."""
        data: Any = self.train_dataset
        options: Any = self.args
        names = ("selection", "granularity", "label_smoothing_factor", "scoring_task")
        key = (self.extra_columns, *(getattr(options, name) for name in names))
        if self._checked is not None and self._checked[0] is data and self._checked[1] == key:
            return self._checked[2]
        index = check_train_dataset(self)
        self._checked = (data, key, index)
        return index

    def scored_task(self) -> Any:
        """As what the labels are scored."""
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
        drawn = rows_to_draw(self.args, batch_size)
        collator = self.data_collator
        self.data_collator = ExtraColumnsCollator(collator, self.extra_columns)
        try:
            loader = super()._get_dataloader(dataset, description, drawn, *args, is_training=True, **kwargs)
        finally:
            self.data_collator = collator
        if self._selects and self.selection_function.needs_irreducible_loss:
            check_collator(loader, dataset, collator)
        return loader

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self._begin_selection(batch_size or self._train_batch_size)
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _begin_selection(self, batch_size: int) -> None:
        """Readies a run: nothing is left of one before, and a loader asked for on the way takes nothing from it."""
        options: Any = self.args
        self.read_options()
        index = self._check_train_dataset()
        self._pending, self._already_drawn, self.announced_step = [], 0, -1
        self._loss_check = LossCheck(self, WEIGHT)
        self.selection_report = self._scoring_training = None
        self.current_gradient_accumulation_steps = 1  # the Trainer's, which `compute_loss` reads before it is set
        if options.report_selection:
            names = ("selection", "selection_ratio", "granularity", "selection_scope", "score_mode", "rescore_every")
            self.selection_report = SelectionReport(index, {name: getattr(options, name) for name in names})
        drawn = rows_to_draw(options, batch_size)
        self._selector = make_selector(self, batch_size, drawn) if self._selects else None
        if options.train_scoring_model and self._selects:
            assert self.scoring_model is not None
            self._scoring_training = ScoringModelTraining(self.scoring_model, self.args)
        if drawn > batch_size and options.max_steps <= 0:
            logger.info(
                "num_train_epochs=%g counts what is drawn, %d rows for each %d trained on: %g of the data set's rows "
                "are trained on. max_steps counts optimizer steps.",
                *(options.num_train_epochs, drawn, batch_size, options.num_train_epochs * batch_size / drawn),
            )

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        dataset = super()._remove_unused_columns(dataset, description)
        collator = self.data_collator
        if isinstance(collator, ExtraColumnsCollator) and can_fetch_columns(dataset, collator.collator):
            return ColumnRows(dataset)
        return dataset

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
            outcome = take_all(batches, self.args.corrupted_column)  # pyright: ignore[reportAttributeAccessIssue]
            chosen = outcome.micro_batches
            if chosen:
                self._report(outcome, time.perf_counter() - self._step_started, 0.0)
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
        self._loss_check(drawn[0])
        rank, step = self.args.process_index, self.state.global_step
        together = None if options.selection_scope == "global" else rank
        generator = torch.Generator().manual_seed(derive_seed(options.seed, step, 0, together, "rho_loss"))
        with random_state_kept(self._scores_with):
            # Dropout's draws: the Trainer puts a checkpoint's random state back after its first choice, not before.
            set_seed(derive_seed(options.seed, step, 0, rank, "scoring") % 2**32)
            outcome = self._selector(self._scores_with, drawn, generator)
        self._report(outcome, loaded - self._step_started, time.perf_counter() - loaded)
        return outcome.micro_batches

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
        step = self.announced_step = self.state.global_step
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
            logits, inputs["labels"], self.scored_task(), label_smoothing=options.label_smoothing_factor
        )
        loss = (weights.to(losses.device) * losses).mean()
        # What the Trainer takes for scaled already (`training_step`), it doesn't divide.
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if scaled:
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
                self.selection_report.save_history(folder)

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
            self.selection_report.load_history(folder)

    def save_selection_report(self, folder: str) -> None:
        """Writes what was chosen so far, by all processes, as selection_report.json; all processes must call it."""
        assert self.selection_report is not None, "report_selection=False"
        sums, counts = self.selection_report.totals(self.args.device)
        if self.is_world_process_zero():
            save_report(Path(folder), self.selection_report.settings, sums, counts)


class RHOLossTrainer(RHOLossMixin, Trainer):
    """`transformers.Trainer` that chooses what it trains on.

    Args:
        model: What is trained; or None, and `model_init`.
        args: `RHOLossArguments`; None for defaults.
        data_collator: Makes a batch of a list of examples; columns of selection pass it by.
        train_dataset: With a column `example_id` (`add_example_ids`, before any map).
        eval_dataset: What `evaluate` takes: one, or several by name.
        processing_class: Tokenizer, image or feature processor, saved with the model.
        model_init: Makes the model at each `train`; what a hyperparameter search needs.
        compute_loss_func: The loss of (outputs, labels, num_items_in_batch), instead of the model's own: the mean of
            what examples are scored by, or `args.check_scored_loss=False` says that it needn't be.
        compute_metrics: Figures of an `EvalPrediction`, by name.
        callbacks: Besides the Trainer's own.
        optimizers: A ready optimizer and scheduler.
        optimizer_cls_and_kwargs: A class and its arguments instead.
        preprocess_logits_for_metrics: What `compute_metrics` gets of (logits, labels).
        irreducible_losses: The table of `compute_irreducible_losses`, for the selections that read it.
        scoring_model: A model that scores in the trained one's place, for its smaller cost; on the same columns.

    Raises:
        ValueError: Before any work, if options, data set, table and model don't belong together.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        irreducible_losses: Dataset | IrreducibleLosses | None = None,
        scoring_model: nn.Module | None = None,
    ) -> None:
        super().__init__(
            model,
            RHOLossArguments() if args is None else args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            irreducible_losses=irreducible_losses,
            scoring_model=scoring_model,
        )
