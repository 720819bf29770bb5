"""Writing whole files and folders, or none: a full disk, a kill or an error leaves what was there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside the path to write under; the file takes its place at the end, and goes after an exception.

    Missing folders are made. What stands under the name is on the disk before the place is taken.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A new folder in the parent, which is made; deleted at the end where `replace_folder` hasn't moved it."""
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", suffix=".tmp", dir=parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(staging: Path, folder: Path) -> None:
    """Moves the new folder to its place; what stood there stays whole until then. Mapped files stay mapped."""
    staging.chmod(0o755)  # mkdtemp's own is for one user
    if folder.exists() and any(folder.iterdir()):
        old = staging.with_name(staging.name + ".old")
        os.replace(folder, old)
        os.replace(staging, folder)
        shutil.rmtree(old)
    else:
        os.replace(staging, folder)
