"""Step, micro-step, rank and the random state of methods that draw while training (slice starts, drop masks).

A draw is a pure function of (seed, step, micro-step, rank, name): recomputation under gradient checkpointing repeats
it, so does a resumed run, and the global random state is left alone. Draws are on inside a training step alone:
scoring (before the step begins), evaluation and generation (after it ends) get none, even of a model in training mode.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_efx.core.files import whole_file

logger = logging.getLogger(__name__)

STATE_FILE = "step_context.pt"  # beside it, where a method has tensors to keep
# Under this key the state stands in a checkpoint's trainer_state.json: see `callback_states`.
STATE_KEY = "hf_efx.step_context"
_ATTRIBUTE = "_efx_step_context"  # in the __dict__ of the model that the context belongs to


def derive_seed(seed: int, step: int, micro_step: int, rank: int | None, name: str) -> int:
    """Hashes a place in a run to a seed from 0 to 2^63 - 1, the same on every machine.

    Args:
        seed: The run's seed.
        step: Optimizer step.
        micro_step: Micro-batch within the step (gradient accumulation).
        rank: Process, or None for a draw that all processes share.
        name: Who draws, such as a module's name.
    """
    place = f"{seed}/{step}/{micro_step}/{rank}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1


class StepState(Protocol):
    """What a method knows that the step alone doesn't tell, for `StepContext.stateful`."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that the next step needs, not copied: it is asked for at each step's end."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        ...


class StepContext:
    """Where a run is, and the random numbers that belong there.

    Under a Trainer, `StepContextCallback` moves it. A loop of one's own calls `begin_step(step)`, `next_micro_step()`
    between the micro-batches, and `end_step()` after the optimizer's step.

    Args:
        seed: The run's seed.
        rank: This process, from 0.

    Attributes:
        max_steps: Length of the run in optimizer steps, None where it isn't known.
        started: Whether a step ever began.
        listeners: Functions that are called when a step has begun.
        stateful: What of the methods isn't a function of the step, such as masks found some steps ago.
    """

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed = seed
        self.rank = rank
        self.max_steps: int | None = None
        self.started = False
        self.listeners: list[Callable[[], None]] = []
        self.stateful: list[StepState] = []
        self.step = 0
        self.micro_step = 0
        self._in_step = False
        self._disabled = False

    @property
    def active(self) -> bool:
        """Whether there are draws: inside a training step and not disabled."""
        return self._in_step and not self._disabled

    def begin_step(self, step: int) -> None:
        """Starts optimizer step `step`, at its first micro-batch."""
        self.step, self.micro_step, self._in_step, self.started = step, 0, True, True
        for listener in self.listeners:
            listener()

    def next_micro_step(self) -> None:
        """Goes on to the step's next micro-batch, after the backward pass of the one before."""
        self.micro_step += 1

    def end_step(self) -> None:
        """Ends the step: until the next one begins there are no draws."""
        self._in_step = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches draws off inside, forward and backward alike; may be nested, and ends with an exception too."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def seed_for(self, name: str, *, shared: bool = False) -> int | None:
        """The seed of a draw here and now, None where there are none. Arguments as for `generator`."""
        if not self.active:
            return None
        return derive_seed(self.seed, self.step, self.micro_step, None if shared else self.rank, name)

    def generator(
        self, name: str, *, shared: bool = False, device: torch.device | str = "cpu"
    ) -> torch.Generator | None:
        """A fresh generator for a draw here and now. Asking again under the same name repeats the draw.

        Args:
            name: Who draws. Modules that shall draw alike (tied ones) use one name.
            shared: True for the same draw on every process, False for one's own.
            device: Where the numbers are drawn.

        Returns:
            The generator, or None where there are no draws and the method is to act as if it weren't there.
        """
        seed = self.seed_for(name, shared=shared)
        return None if seed is None else torch.Generator(device).manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Seed, step, and `file` where `save` writes one. Checkpoints are taken between steps, not micro-steps."""
        file = {"file": True} if any(one.state_dict() for one in self.stateful) else {}
        return {"seed": self.seed, "step": self.step, **file}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the checkpoint's seed and step over.

        A seed other than the one given is replaced, with a warning: the resumed run goes on as the first one would
        have.

        Raises:
            ValueError: If seed or step is missing.
        """
        if not {"seed", "step"} <= set(state):
            raise ValueError(f"The step context's state is {state!r}; it needs 'seed' and 'step' (see state_dict()).")
        if state["seed"] != self.seed:
            logger.warning("The checkpoint's draws have seed=%s, not %s: going on with it.", state["seed"], self.seed)
        self.seed, self.step = state["seed"], state["step"]
        self.micro_step, self._in_step = 0, False

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the state of `stateful` into a checkpoint, as `step_context.pt`; no file where there is none."""
        states = [one.state_dict() for one in self.stateful]
        if any(states):
            with whole_file(Path(folder, STATE_FILE)) as temporary:
                torch.save(states, temporary)
        else:
            Path(folder, STATE_FILE).unlink(missing_ok=True)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: If it isn't there, or is of other methods.
        """
        file = Path(folder, STATE_FILE)
        states = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else []
        if len(states) != len(self.stateful):
            raise ValueError(
                f"{file} has the state of {len(states)} methods, the model has {len(self.stateful)} with one: the run "
                f"can't go on as it would have. Give the train(resume_from_checkpoint=...) of an EfxTrainer the whole "
                f"checkpoint, and the model that was saved there."
            )
        for one, state in zip(self.stateful, states, strict=True):
            one.load_state_dict(state)


def step_context(model: nn.Module) -> StepContext | None:
    """The context that the training-time methods on a model draw from, one for all of them; None without any."""
    return next((m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__), None)


def attach_step_context(model: nn.Module) -> StepContext:
    """The model's context, made (with seed 0) where there is none yet."""
    context = step_context(model)
    if context is None:
        context = model.__dict__[_ATTRIBUTE] = StepContext(seed=0)
    return context


def detach_step_context(model: nn.Module) -> None:
    """Takes the context off a model that no method draws on any more."""
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)


class StepContextCallback(TrainerCallback):
    """Moves a `StepContext` along with a Trainer, and keeps its state in the checkpoints' trainer_state.json.

    Args:
        context: The context that the model's methods draw from. None for the model's own, with the run's seed: it is
            looked up when training begins, and where the model has none, the callback does nothing.

    Attributes:
        checkpoint: The checkpoint that is resumed from, where it isn't the one of that step in `output_dir`.
        saves: Whether `on_save` adds to checkpoints. An `EfxTrainerMixin` sets both: it knows every folder.
    """

    def __init__(self, context: StepContext | None = None) -> None:
        self.context = context
        self.checkpoint: str | None = None
        self.saves = True
        self._given = context

    def metrics(self) -> dict[str, float]:
        """Figures for the next training log, described in docs/metrics.md. An `EfxTrainerMixin` asks for them."""
        return {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes this process' rank and the run's length, and on resuming the checkpoint's state.

        Raises:
            ValueError: If the model's methods draw from another context than the one given, or the checkpoint lacks
                what they need.
        """
        own = step_context(kwargs["model"])
        if self._given is not None and own is not None and own is not self._given:
            raise ValueError(
                f"{type(self).__name__}(context) was given another model's StepContext: the methods on this one would "
                f"never draw. Leave the argument out."
            )
        self.context = self._given or own
        if self.context is None:
            return
        if self._given is None:
            self.context.seed = args.seed
        self.context.rank = args.process_index
        self.context.max_steps = state.max_steps
        self.context.end_step()
        saved = callback_states(state).get(STATE_KEY)
        if saved is not None:
            self.context.load_state_dict(saved)
            if saved.get("file"):
                self.context.load(self.checkpoint or _folder(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a step."""
        if self.context is not None:
            self.context.begin_step(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes on to the next micro-batch."""
        if self.context is not None:
            self.context.next_micro_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the step and writes the state down for a checkpoint that may follow."""
        if self.context is None:
            return
        self.context.end_step()
        callback_states(state)[STATE_KEY] = self.context.state_dict()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the figures to a training log that doesn't have them yet: an EfxTrainer's has."""
        logs = kwargs.get("logs") or {}
        if "loss" not in logs and "train_loss" not in logs:
            return
        missing = {name: value for name, value in self.metrics().items() if name not in logs}
        logs.update(missing)
        if state.log_history:
            state.log_history[-1].update(missing)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds to the checkpoint what trainer_state.json can't hold."""
        folder = _folder(args, state)
        if self.context is not None and self.saves and args.should_save and folder.is_dir():  # a search has others
            self.context.save(folder)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def callback_states(state: TrainerState) -> dict[str, Any]:
    """What trainer_state.json keeps for callbacks, by a key of each one's own: JSON values.

    It is empty when a run begins, and the checkpoint's when one is resumed. So a callback starts from it in
    `on_train_begin`, keeps nothing else from an earlier run or a search's earlier trial, and writes its state there in
    `on_step_end`, before a checkpoint may be taken:

        self.seconds = callback_states(state).get("my_package.my_callback", 0.0)

    The key is no class name: with `restore_callback_states_from_checkpoint` transformers would make a new callback.
    """
    states: Any = state.stateful_callbacks  # annotated as what it is made from, a list
    return states
