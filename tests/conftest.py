"""Fixtures that several rooms of the suite use."""

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer

REPOSITORY = Path(__file__).parents[1]


def pytest_collection_finish() -> None:
    """Takes what was imported out of the garbage collector's sight: each `Trainer.train` has it look at everything."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Hub:
    """A running local Hub.

    Attributes:
        endpoint: Its address, HF_ENDPOINT in `env`.
        root: The folder where it keeps what is pushed (see hub_store.py for what lies where).
        env: A whole environment for subprocesses that work against it: huggingface_hub and datasets read HF_ENDPOINT
            at import, so this process can't be turned to it.
    """

    endpoint: str
    root: Path
    env: dict[str, str]


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A local Hub for the whole session: give repositories names of your own."""
    folder = tmp_path_factory.mktemp("hub")
    # The caller's own Hugging Face settings (caches, tokens, offline switches) must not reach the tests.
    foreign = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    with HubServer(folder / "server") as server:
        env |= {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": "dummy",
            "HF_HUB_DISABLE_XET": "1",  # hf_xet would send files to another service
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would count the download elsewhere
            "no_proxy": "127.0.0.1",
        }
        yield Hub(server.endpoint, server.root, env)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """A function that runs Python in a new process: see `_run_python`."""
    return _run_python


def _run_python(
    code_or_script: str | Path, env: dict[str, str] | None = None, args: Sequence[object] = (), timeout: float = 300
) -> str:
    """Run code in a new process with the repository's root on its path.

    Args:
        code_or_script: Python source as a string (indentation common to all lines is taken off), or a script's Path.
        env: The whole environment, e.g. `hub.env`; this process's own by default.
        args: What the process finds in `sys.argv[1:]`, as strings.
        timeout: Seconds before it is killed.

    Returns:
        What it wrote to stdout.

    Raises:
        RuntimeError: Its exit status isn't 0; the message ends in its stdout and stderr.
        subprocess.TimeoutExpired: It ran past `timeout`.
    """
    source = ["-c", textwrap.dedent(code_or_script)] if isinstance(code_or_script, str) else [str(code_or_script)]
    env = dict(os.environ if env is None else env)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    command = [sys.executable, *source, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        output = f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        raise RuntimeError(f"the Python subprocess ended with status {done.returncode}\n{output}")
    return done.stdout
