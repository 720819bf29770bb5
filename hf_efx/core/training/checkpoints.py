"""Which checkpoint folders are whole, and which of them a run should go on from.

The Trainer writes a checkpoint in place, file after file, under its final name: after a crash or on a full disk a torn
folder stays behind, and `transformers.trainer_utils.get_last_checkpoint`, which reads folder names alone, hands it
out. Here a folder counts only if what is in it is whole. Nothing is unpickled and no weight is read: headers and sizes
tell.
"""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from hf_efx.core.training.step_context import STATE_FILE, STATE_KEY

logger = logging.getLogger(__name__)

# A model's or an adapter's weights, several adapters' in sub-folders; shards of FSDP and of DeepSpeed.
_WEIGHT_PATTERNS = ("*.safetensors", "*/*.safetensors", "pytorch_model*", "global_step*")
# What the Trainer writes with torch.save, whose format is a zip: a cut file has lost the directory at its end.
_ZIP_PATTERNS = ("*.pt", "*.pth", "training_args.bin", "optimizer*.bin", "pytorch_model*.bin")
# torch.save has no exception class of its own for a failing disk: its zip writer names its source file, or C++ streams
# give this message (both seen with torch 2.13, on a full disk and past a file-size limit).
_TORCH_WRITE_ERRORS = ("inline_container.cc", "iostream error")
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit of the safetensors format


class CheckpointWriteError(OSError):
    """A checkpoint couldn't be written: a full disk, a quota, a file-size limit, missing rights."""


def explain_incomplete(folder: str | os.PathLike[str]) -> str | None:
    """Says why a checkpoint folder of a Trainer is torn.

    Whole means: `trainer_state.json`, which is written last, is there; every JSON file parses; there are weights (a
    model's, an adapter's, or FSDP's or DeepSpeed's shards, which are not looked into); every safetensors file is as
    long as its header says and every shard that an index names is there; what torch.save wrote is a whole zip; with an
    optimizer come its schedule and the random state. A checkpoint without an optimizer (`save_only_model`) is whole.

    Args:
        folder: A `checkpoint-<step>` folder.

    Returns:
        The first reason found, naming the file; None for a whole checkpoint.
    """
    path = Path(folder)
    if not path.is_dir():
        return f"{path} is no folder"
    if not (path / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            return f"{file.name} is no whole JSON file ({error})"
    callbacks = json.loads((path / TRAINER_STATE_NAME).read_bytes()).get("stateful_callbacks", {})
    if callbacks.get(STATE_KEY, {}).get("file") and not (path / STATE_FILE).is_file():
        return f"{STATE_FILE}, which {TRAINER_STATE_NAME} names, is missing"
    return _explain_weights(path) or _explain_zips(path)


def _explain_weights(path: Path) -> str | None:
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        return "it holds no weights"
    for index in (path / SAFE_WEIGHTS_INDEX_NAME, path / WEIGHTS_INDEX_NAME):
        shards = set(json.loads(index.read_bytes()).get("weight_map", {}).values()) if index.is_file() else {"."}
        if not shards:
            return f"{index.name} names no shards"
        missing = sorted(name for name in shards if not (path / name).exists())
        if missing:
            return f"the shard {missing[0]}, which {index.name} names, is missing"
    for file in sorted(path.rglob("*.safetensors")):
        reason = _explain_safetensors(file)
        if reason:
            return f"{file.relative_to(path)} {reason}"
    return None


def _explain_safetensors(file: Path) -> str | None:
    """Compares a file's size with what its header promises: 8 bytes of header length, JSON header, tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_SAFETENSORS_HEADER):
            return f"is cut within its header ({size:,} bytes)"
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return f"has a broken header ({error})"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"has {size:,} bytes, its header promises {expected:,}"


def _explain_zips(path: Path) -> str | None:
    for pattern in _ZIP_PATTERNS:
        for file in sorted(path.glob(pattern)):
            if not zipfile.is_zipfile(file):
                return f"{file.name} is no whole torch.save file ({file.stat().st_size:,} bytes)"
    if (path / OPTIMIZER_NAME).is_file():
        # The Trainer skips the optimizer silently where its schedule is missing.
        if not (path / SCHEDULER_NAME).is_file():
            return f"{SCHEDULER_NAME} is missing beside {OPTIMIZER_NAME}"
        if not any(path.glob("rng_state*.pth")):
            return f"the random state rng_state*.pth is missing beside {OPTIMIZER_NAME}"
    return None


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The whole checkpoint with the highest step in a run's folder.

    Torn ones that are newer are passed over, each with a warning that says why.

    Args:
        output_dir: The run's folder, `TrainingArguments.output_dir`.

    Returns:
        Its path, or None if there is none (or no such folder).
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {}
    for path in Path(output_dir).iterdir() if Path(output_dir).is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and path.is_dir():
            steps[int(match[1])] = path
    for step in sorted(steps, reverse=True):
        reason = explain_incomplete(steps[step])
        if reason is None:
            return str(steps[step])
        logger.warning(
            "Passing over the torn checkpoint %s: %s. It can't be resumed from and may be deleted.",
            steps[step],
            reason,
        )
    return None


@contextmanager
def explained_write_errors(field: str, folder: str | os.PathLike[str], step: int) -> Iterator[None]:
    """Turns an error while writing under a folder into one that says what to do.

    safetensors raises its own error class on a full disk and torch.save a RuntimeError of its zip writer: both come
    out as an OSError here. Other errors pass through as they are.

    Args:
        field: The option that chose the folder.
        folder: That option's value.
        step: The optimizer step.

    Raises:
        CheckpointWriteError: With field, folder, step and the way out; the cause is chained.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _TORCH_WRITE_ERRORS):
            raise
        # Around a whole checkpoint and around its weights: the outer one knows the option.
        cause = error.__cause__ if isinstance(error, CheckpointWriteError) else error
        raise CheckpointWriteError(
            f"Saving at step {step} under {field}={os.fspath(folder)!r} failed: {cause}. The model in memory and "
            f"earlier checkpoints are unharmed. Free space there (a save_total_limit keeps fewer checkpoints) or move "
            f"{field} to another disk, then go on from the newest complete checkpoint with "
            f"train(resume_from_checkpoint=True)."
        ) from cause
