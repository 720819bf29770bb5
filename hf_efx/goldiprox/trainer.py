"""GoldiProxTrainer: a small proxy that trains by RHO-LOSS and keeps the sequence of examples that it chose.

"Prioritized training on points that are learnable, worth learning, and not yet learnt", Mindermann et al. 2021,
arXiv 2107.02565.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from hf_efx.core.data.example_ids import check_dataset
from hf_efx.core.data.fingerprints import data_fingerprint, weights_fingerprint
from hf_efx.core.data.text_data import source_name
from hf_efx.core.scoring.scoring_state import base_model
from hf_efx.goldiprox.recording import SequenceRecorder
from hf_efx.goldiprox.sequence import SelectionSequence
from hf_efx.rho_loss.exchange import gather_equal
from hf_efx.rho_loss.irreducible_table import changes
from hf_efx.rho_loss.selecting import resolve_precision
from hf_efx.rho_loss.trainer import RHOLossMixin, RHOLossTrainer

logger = logging.getLogger(__name__)

RECORDING_FOLDER = "selection_recording"  # in output_dir

_Base = Trainer if TYPE_CHECKING else object


class GoldiProxMixin(RHOLossMixin, _Base):
    """A proxy that selects, over any Trainer class.

    `select` is a training run of the proxy that keeps what it chose. It takes all options of `RHOLossMixin` but those
    that a sequence of ids can't hold: choices among tokens, choices with weights, and choices that depend on how many
    processes made them.

    Args:
        *args: As for `RHOLossMixin`; the model is the proxy.
        **kwargs: As for `RHOLossMixin`: `irreducible_losses`, `scoring_model`.
    """

    _recorder: SequenceRecorder | None = None
    _recorded_settings: dict[str, Any] | None = None  # of the selection that is under way
    _chosen: tuple[torch.Tensor, torch.Tensor] | None = None

    def select(
        self,
        num_steps: int,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        fingerprint_columns: Sequence[str] | None = None,
    ) -> SelectionSequence:
        """Trains the proxy and records which examples it trains on.

        What is recorded so far lies in `output_dir` and is on disk with each checkpoint; a resumed selection goes on
        from there, and its sequence is that of a run without a break.

        Args:
            num_steps: Optimizer steps, the sequence's length; used in the place of `max_steps` and
                `num_train_epochs`.
            resume_from_checkpoint: As for `train`.
            fingerprint_columns: The columns by which the data set is known again; None for those of the irreducible
                losses, or without a table all. With those that the examples were made from (text, label) the sequence
                fits a copy that was tokenized for another model.

        Returns:
            The sequence, memory-mapped from `output_dir`, on every process: `save_to_disk` or `push_to_hub` it from
            one. It is shorter than `num_steps` if a callback stopped the run.

        Raises:
            ValueError: Before any work, if the options, as they stand on `args` now, can't be recorded, or the
                recording doesn't reach the checkpoint.
        """
        self.read_options()
        self._check_recordable(num_steps)
        checkpoint = self._resume_point(resume_from_checkpoint)
        settings = {"data": self._data_settings(fingerprint_columns), "score": self._score_settings()}
        recorder = None
        if checkpoint is not None:
            step = int(Path(checkpoint).name.rpartition("-")[2])
            if step > num_steps:
                raise ValueError(
                    f"num_steps={num_steps}, but resume_from_checkpoint={checkpoint!r} is at step {step} already: ask "
                    f"for more steps, or name an earlier checkpoint."
                )
            if self.is_world_process_zero():
                recorder = SequenceRecorder.resume(self._recording_folder, step)
                self._check_same_selection(recorder.settings, settings)
        max_steps, self.args.max_steps = self.args.max_steps, num_steps
        self._recorder, self._recorded_settings = recorder, settings
        try:
            self.train(checkpoint)
            return self._finish_recording(settings)
        finally:
            self.args.max_steps = max_steps
            self._recorder = self._recorded_settings = self._chosen = None

    @property
    def _recording_folder(self) -> Path:
        return Path(str(self.args.output_dir), RECORDING_FOLDER)

    def _check_recordable(self, num_steps: int) -> None:
        options: Any = self.args
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: expected 1 or more optimizer steps.")
        check_dataset(self.train_dataset, "train_dataset", ids=True)
        if not self._selects:
            raise ValueError("selection_ratio=1 chooses nothing, so there is no sequence to select: lower it.")
        if options.granularity == "token":
            raise ValueError(
                "granularity='token': a sequence names whole examples, so a replay couldn't leave out the tokens that "
                "weren't chosen. Use granularity='example'."
            )
        if self.selection_function.sampled:
            raise ValueError(
                f"selection={options.selection!r} weighs its examples, and a sequence keeps no weights: choose a "
                f"selection that takes the highest scores, such as 'rho_loss'."
            )
        if self.args.world_size > 1 and options.selection_scope != "global":
            raise ValueError(
                f"selection_scope={options.selection_scope!r} over {self.args.world_size} processes chooses the best "
                f"of each one's own draw, so the sequence would depend on their number: use selection_scope='global'."
            )

    def _data_settings(self, columns: Sequence[str] | None) -> dict[str, Any]:
        data: Any = self.train_dataset
        if columns is None and self.irreducible_losses is not None and self.selection_function.needs_irreducible_loss:
            known = self.irreducible_losses.settings  # compared with the data set when this Trainer was made
            return {
                "fingerprint": known["data_fingerprint"],
                "columns": known["fingerprint_columns"],
                "rows": len(data),
            }
        columns = sorted(set(data.column_names if columns is None else columns) - {"example_id"})
        return {"fingerprint": data_fingerprint(data, columns), "columns": columns, "rows": len(data)}

    def _score_settings(self) -> dict[str, Any]:
        options: Any = self.args
        names = ("selection", "selection_ratio", "score_mode", "rescore_every")
        table = self.irreducible_losses if self.selection_function.needs_irreducible_loss else None
        return {
            **{name: getattr(options, name) for name in names},
            "scoring_precision": resolve_precision(options),
            "examples_per_step": self._train_batch_size * options.gradient_accumulation_steps * options.world_size,
            "label_smoothing": options.label_smoothing_factor,
            "scoring_model": None if self.scoring_model is None else _name(self.scoring_model),
            "irreducible_losses": None if table is None else table.settings,
        }

    def _check_same_selection(self, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
        for part, now in settings.items():
            if changed := changes(recorded[part], now):
                raise ValueError(
                    f"the recording in {str(self._recording_folder)!r} was made with other settings ({changed}): "
                    f"resume with those, or start anew."
                )

    # --- recording

    def on_selection(self, step: int, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes what this process trains on in a step; see `RHOLossMixin.on_selection`."""
        super().on_selection(step, ids, scores)
        self._chosen = (ids, scores)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Chooses a step's micro-batches as `RHOLossMixin` does, and while selecting records them."""
        self._chosen = None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        chosen: tuple[torch.Tensor, torch.Tensor] | None = self._chosen  # by `on_selection`, meanwhile
        if self._recorded_settings is not None and chosen is not None:
            self._record(self.state.global_step, *chosen, len(batches), self._recorded_settings)
        return batches, count

    def _record(
        self, step: int, ids: torch.Tensor, scores: torch.Tensor, parts: int, settings: dict[str, Any]
    ) -> None:
        if self.args.world_size > 1:
            ids, scores = (gather_equal(each.to(self.args.device)).cpu() for each in (ids, scores))
            # The first micro-batch of each process, then the second ones: as one process with them all has them.
            ids, scores = (torch.cat([p for m in _parts(each, parts) for p in m]) for each in (ids, scores))
        if not self.is_world_process_zero():
            return
        if self._recorder is None:  # here, for model_init makes the proxy when training begins
            proxy = {
                "model": _name(self.model),  # pyright: ignore[reportArgumentType]
                "initial_weights": self._weights(),
                "learning_rate": self.args.learning_rate,
                "seed": self.args.seed,
            }
            self._recorder = SequenceRecorder.begin(self._recording_folder, {**settings, "proxy": proxy})
        self._recorder.add(step, ids.numpy(), scores.numpy().astype(np.float32))

    def _weights(self) -> str | None:
        """The proxy's hash; None where no process has it whole."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        return weights_fingerprint(self.model)  # pyright: ignore[reportArgumentType]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._recorder is not None:
            self._recorder.flush()  # before: a checkpoint never lies ahead of the recording
        super()._save_checkpoint(model, trial)

    def _finish_recording(self, settings: dict[str, Any]) -> SelectionSequence:
        if self._recorder is not None:
            self._recorder.flush()
        self.accelerator.wait_for_everyone()
        steps = self.state.global_step
        if steps < self.args.max_steps:
            logger.warning("The selection was stopped at step %d of %d.", steps, self.args.max_steps)
        recorder = SequenceRecorder(self._recording_folder, steps)
        final = None if self.args.load_best_model_at_end else self._weights()
        proxy = {**recorder.settings["proxy"], "final_weights": final}
        return SelectionSequence.make(recorder.finish(), settings["data"], settings["score"], proxy)


class GoldiProxTrainer(GoldiProxMixin, RHOLossTrainer):
    """`RHOLossTrainer` that hands on what it chose, by `select`; see `GoldiProxMixin`. The model is the proxy.

    Its arguments are those of `RHOLossTrainer`.
    """


def _parts(ranks: torch.Tensor, parts: int) -> list[list[torch.Tensor]]:
    """[processes, k] as a list of micro-batches, each a list over the processes."""
    return [list(part) for part in torch.tensor_split(ranks, parts, dim=1)]


def _name(model: nn.Module) -> str:
    model = base_model(model)
    return source_name(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
