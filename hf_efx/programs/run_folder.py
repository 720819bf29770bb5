"""Whose run lies in a folder: a resumed program knows a finished run by it, and refuses another's checkpoints."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_efx.core.files import write_atomically
from hf_efx.core.training.checkpoints import last_complete_checkpoint

RUN = "run.json"
# Arguments that leave the figures of a run as they are, by the beginnings of their names.
_NO_MATTER = ("output_dir", "run_name", "project", "trackio", "do_", "log", "save_", "push_", "hub_", "report_to")
_NO_MATTER += ("disable_tqdm", "resume_", "dataloader_num", "dataloader_pin", "dataloader_pre", "dataloader_pers")
_NO_MATTER += ("skip_memory", "model_card", "ddp_", "restore_callback", "enable_jit_checkpoint", "local_rank")
LENGTH = ("max_steps", "num_train_epochs")  # a run may be lengthened when it is resumed


@dataclass
class Run:
    """One finished run.

    Attributes:
        name: In tables and plots.
        figures: By name, for results.
        curve: Of each evaluation: step, training seconds, metric.
    """

    name: str
    figures: dict[str, Any]
    curve: list[tuple[int, float, float]]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and by run.json in it whose run it is: one that is finished, or one to go on with.

    Attributes:
        path: The folder.
        settings: All that the run's figures depend on, but for its length.
        length: The steps and epochs asked for.
        data: Options that load the run's data again, for programs that look at its model; not compared.
    """

    path: Path
    settings: Mapping[str, Any]
    length: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)

    def check(self, resume: bool) -> None:
        """Refuses a folder where another run's checkpoints lie, which this run would take now, or once it is cut.

        Settings that aren't known yet are not compared.

        Raises:
            ValueError: With what differs, and the way out.
        """
        there, checkpoint = self._read(), last_complete_checkpoint(self.path)
        if there and (other := there["settings"].get("program")) != self.settings.get("program"):
            raise ValueError(
                f"output_dir={str(self.path)!r} holds a run of {other}, whose model and results this one would write "
                f"over: name another --output_dir."
            )
        if there is None and checkpoint is not None:
            raise ValueError(
                f"output_dir={str(self.path)!r} holds checkpoints of an unknown run ({RUN} is missing): name the one "
                f"to go on from with --resume_from_checkpoint, or another --output_dir."
            )
        if there is None or not (resume or checkpoint):
            return
        known, own = there["settings"], self._plain()
        if not resume:
            known, own = {**known, **there["length"]}, {**own, **self.length}
        known = {name: value for name, value in known.items() if name in own}
        if known != own:
            raise ValueError(
                f"output_dir={str(self.path)!r} holds a run with other settings ({_differences(known, own)}): give "
                f"those again, or name another --output_dir."
            )
        step = int((checkpoint or "-0").rpartition("-")[2])
        if 0 < self.length["max_steps"] < step:
            raise ValueError(
                f"max_steps={self.length['max_steps']}, but {checkpoint} is past it: name an earlier checkpoint with "
                f"--resume_from_checkpoint, or another --output_dir."
            )

    def finished(self) -> Run | None:
        """The run, if it is finished at this length."""
        there = self._read()
        if there is None or (there["settings"], there["length"]) != (self._plain(), dict(self.length)):
            return None
        return Run(**there["run"]) if there["run"] else None

    def is_known(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RUN).is_file()

    def write(self, run: Run | None = None) -> None:
        """Says whose folder it is, and of a finished run its figures."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"settings": self._plain(), "length": self.length, "run": run and dataclasses.asdict(run)}
        content["data"] = dict(self.data)
        write_atomically(self.path / RUN, json.dumps(content, indent=1) + "\n")

    def _plain(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.settings, default=str))

    def _read(self) -> dict[str, Any] | None:
        return _content(self.path)


def _content(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RUN).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def data_of_run(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], str | None]:
    """The options that load the data of the run in a folder, and the fingerprint of what it trained on.

    Nothing of both where no run of a program lies there, as at a checkpoint of others.
    """
    content = _content(Path(folder)) or {}
    return content.get("data", {}), content.get("settings", {}).get("data")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Up to three settings that differ, as `name: value, now value`."""
    old, new = _flat(there), _flat(here)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = [f"{name}: {str(old.get(name))[:40]}, now {str(new.get(name))[:40]}" for name in names[:3]]
    return "; ".join([*shown, "..."] if len(names) > 3 else shown)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for name, value in settings.items():
        pairs |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return pairs


def training_settings(args: Any) -> dict[str, Any]:
    """The arguments that decide the outcome of a run, a method's own among them, but for its length."""
    kept = ("save_strategy", "save_steps") if args.load_best_model_at_end else ()  # among which the best is looked for
    settings = {
        name: value
        for name, value in args.to_dict().items()
        if name in kept or not (name.startswith(_NO_MATTER) or name in LENGTH)
    }
    return {"processes": args.world_size, **settings}
