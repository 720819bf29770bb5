"""A built wheel, installed elsewhere, works as the checkout does."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow  # builds in isolation: pip fetches setuptools


def run(*command: object, **kwargs: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)  # pyright: ignore
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the repository."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "hf_efx", source / "hf_efx", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source)
    return next(folder.glob("hf_efx-*.whl"))


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = REPOSITORY / "hf_efx"
    files = {p.relative_to(REPOSITORY).as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert inside == files
    assert {"hf_efx/py.typed", "hf_efx/core/templates/model_card.md.jinja"} <= inside


def test_installed_elsewhere_it_runs_from_anywhere(wheel, tmp_path):
    target = tmp_path / "target"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel)
    env = {**os.environ, "PYTHONPATH": str(target)}
    where = run(sys.executable, "-c", "import hf_efx; print(hf_efx.__file__)", cwd=tmp_path, env=env)
    assert Path(where.strip()).is_relative_to(target)
    assert "low-rank" in run(target / "bin" / "hf-efx", "list", cwd=tmp_path, env=env)
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {i} of some text to train on" for i in range(200)))
    small = "n_layer=1,n_embd=16,n_head=2,n_positions=32"
    arguments = ("--dataset", "text.txt", "--block_size", 32, "--max_steps", 2, "--config_overrides", small)
    shown = run(target / "bin" / "hf-efx", "low-rank", *arguments, cwd=tmp_path, env=env)
    assert "perplexity" in shown and (tmp_path / "runs" / "low_rank" / "README.md").is_file()
