"""English text that every Python installation carries: documentation strings and comments of its standard library, and
the language reference behind `help()`. Beside it the split by hash, for any text that brings no split of its own.
"""

import ast
import collections
import functools
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Shares of the documents held out where a source brings no split of its own.
VALIDATION_SHARE = TEST_SHARE = 0.03
REFERENCE = "language reference"

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_COMMENT_MARK = re.compile(r"^[ \t]*#+[:!]? ?", re.MULTILINE)


def standard_library_text() -> dict[str, list[str]]:
    """Reads the English text of this Python's standard library: about 2.8 MB, in 3 s, once a process.

    Sources are parsed, never imported. A paragraph that occurs twice is kept once, so that no split holds a paragraph
    of another; the split goes by the paragraph's hash and never changes for a given Python.

    Returns:
        Paragraphs by split: `train`, `validation` and `test`, in the order of the sources.

    Raises:
        FileNotFoundError: If this Python comes without its library's sources.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for _, paragraph in _library_paragraphs():
        splits[split_of(hash_place(paragraph))].append(paragraph)
    if not all(splits.values()):
        raise _no_library()
    return splits


def labelled_library_text(labels: int) -> list[tuple[str, str]]:
    """The paragraphs of `standard_library_text`, each with the part of the library that it comes from.

    Args:
        labels: So many parts, those with the most paragraphs: top-level packages and modules (`email`, `asyncio`,
            `typing`, ...), and the language reference. Which ones they are depends on the Python installation.

    Returns:
        (part, paragraph) in the order of the sources.

    Raises:
        FileNotFoundError: If this Python comes without its library's sources.
    """
    paragraphs = _library_paragraphs()
    counts = collections.Counter(part for part, _ in paragraphs)
    if len(counts) < labels:
        raise _no_library()
    kept = {part for part, _ in counts.most_common(labels)}
    return [(part, paragraph) for part, paragraph in paragraphs if part in kept]


def _no_library() -> FileNotFoundError:
    return FileNotFoundError(
        f"this Python has no library sources with text under {sysconfig.get_path('stdlib')}: name a text file, a "
        "folder or a Hub data set"
    )


@functools.cache
def _library_paragraphs() -> tuple[tuple[str, str], ...]:
    """(part of the library, paragraph) of each paragraph of prose; what occurs twice is its first part's."""
    parts: dict[str, str] = {}
    for part, text in _library_texts(Path(sysconfig.get_path("stdlib"))):
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = "\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines())
            if paragraph not in parts and _is_prose(paragraph):
                parts[paragraph] = part
    return tuple((part, paragraph) for paragraph, part in parts.items())


def _library_texts(root: Path) -> Iterator[tuple[str, str]]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)  # installed packages may be gigabytes: stay out
        for name in sorted(names):
            if name.endswith(".py"):
                part = Path(folder, name).relative_to(root).parts[0].removesuffix(".py")
                yield from ((part, text) for text in _source_texts(Path(folder, name).read_bytes()))
    from pydoc_data.topics import topics

    yield from ((REFERENCE, text) for text in topics.values())


def _source_texts(source: bytes) -> Iterator[str]:
    """Documentation strings of one Python source, then its blocks of whole-line comments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own escapes are not our business
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template or a test of the parser
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    for block in _COMMENTS.findall(source.decode("utf-8", errors="ignore")):
        yield _COMMENT_MARK.sub("", block)


def _is_prose(paragraph: str) -> bool:
    """Whether it is a sentence rather than a table, a rule or code: at least 40 characters, 70% of them letters."""
    return len(paragraph) >= 40 and sum(c.isalpha() or c == " " for c in paragraph) >= 0.7 * len(paragraph)


def hash_place(text: str) -> float:
    """A text's place in [0, 1), which depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def split_of(place: float) -> str:
    """The split at a `hash_place`: 3% validation, 3% test, the rest train."""
    if place < VALIDATION_SHARE:
        return "validation"
    return "test" if place >= 1 - TEST_SHARE else "train"
