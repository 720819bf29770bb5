"""What a run costs: the time of its steps and the memory of its optimiser."""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx.core.training.step_context import callback_states

_CLOCK = "hf_efx.training_clock"


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimiser's state, on this process."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StepTimer(TrainerCallback):
    """Times each optimiser step, without loading data, logging, evaluating and saving.

    Attributes:
        seconds: Of each step of the run in this process, resumed parts included.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets an earlier run's steps."""
        if state.global_step == 0:
            self.seconds = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._start)


class TrainingClock(TrainerCallback):
    """Times training as a whole: loading, scoring and steps, without evaluating and saving.

    Each evaluation's row in `state.log_history` gets `train_seconds`; a resumed run counts on from its checkpoint.
    Scoring of a selecting Trainer lies between two steps, where `StepTimer` doesn't look.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock, on resuming where the checkpoint has it."""
        self.seconds, self._since = callback_states(state).get(_CLOCK, 0.0), time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts what has passed since the last step's end, or since evaluating and saving after it."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        callback_states(state)[_CLOCK] = self.seconds

    def leave_out(self, seconds: float) -> None:
        """Doesn't count what another callback took for itself at a step's end."""
        self._since += seconds

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the time in the evaluation's row, and leaves the evaluation out."""
        if state.log_history:
            state.log_history[-1]["train_seconds"] = self.seconds
        self._since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves saving out."""
        self._since = time.perf_counter()
