"""Storage of the local Hub (hub_server.py): repositories, their commits and the contents of their files."""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".model", ".npy", ".npz", ".zip", ".gz", ".png")
ID_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no leading dot: ids are file paths below


class HubError(Exception):
    """An answer other than success: HTTP status, text, and the X-Error-Code that clients turn into an error class."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def front_matter(card: str) -> dict:
    """The YAML block at the head of a README.md, {} without one; a 400 HubError where it isn't a mapping."""
    match = re.match(r"\s*---\r?\n(.*?)^---\s*$", card, flags=re.DOTALL | re.MULTILINE)
    try:
        metadata = (yaml.safe_load(match[1]) or {}) if match else {}
    except yaml.YAMLError as error:
        raise HubError(400, f"The card's metadata isn't valid YAML: {error}") from error
    if not isinstance(metadata, dict):
        raise HubError(400, f"The card's metadata must be a mapping, got {type(metadata).__name__}")
    return metadata


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(digest: str, size: int) -> bytes:
    """The small text that git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()


def file_info(record: dict, sha: str, path: str) -> dict:
    """A file as the Hub lists it, with the commit that last changed it."""
    commits = record["commits"]
    entry = commits[sha]["files"][path]
    while (parent := commits[sha]["parent"]) and commits[parent]["files"].get(path) == entry:
        sha = parent
    info = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
    info["lastCommit"] = {"id": sha, "title": commits[sha]["title"], "date": commits[sha]["date"]}
    if digest := entry["lfs"]:
        pointer_size = len(lfs_pointer(digest, entry["size"]))
        info["lfs"] = {"oid": digest, "sha256": digest, "size": entry["size"], "pointerSize": pointer_size}
    return info


def folder_info(files: dict[str, dict], folder: str) -> dict:
    """A folder as the Hub lists it; its id changes with anything inside."""
    content = sorted((path, entry["oid"]) for path, entry in files.items() if path.startswith(folder + "/"))
    return {"type": "directory", "path": folder, "oid": hashlib.sha1(repr(content).encode()).hexdigest(), "size": 0}


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder that holds one of the paths, at any depth, without the root."""
    return {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {"."}


class HubStore:
    """Repositories on disk: `objects/<hash>` holds contents, `<kind>/<user>/<name>.json` commits, branches and tags.

    A commit is {"parent", "title", "message", "date", "files"}; `files` maps each path to {"oid" (git blob id),
    "size" (bytes), "lfs" (sha256, None for a plain blob)}. Commits are never dropped: old revisions stay.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.lock = root, threading.Lock()
        (root / "objects").mkdir(parents=True, exist_ok=True)

    def object_path(self, digest: str) -> Path:
        """Where content lies: by sha256 if it came through LFS, else by git blob id."""
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
            raise HubError(400, f"Not a content hash: {digest!r}")
        return self.root / "objects" / digest

    def _record_path(self, kind: str, repo_id: str) -> Path:
        if not all(ID_SEGMENT.fullmatch(segment) for segment in repo_id.split("/")):
            raise HubError(400, f"Not a repository id: {repo_id!r}")
        return self.root / kind / f"{repo_id}.json"

    def load(self, kind: str, repo_id: str) -> dict:
        path = self._record_path(kind, repo_id)
        if not path.is_file():
            raise HubError(404, "Repository not found", "RepoNotFound")
        return json.loads(path.read_text(encoding="utf-8"))

    def _save(self, kind: str, record: dict) -> None:
        path = self._record_path(kind, record["id"])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record), encoding="utf-8")
        os.replace(part, path)  # readers take no lock: they see the old record or the new one

    def create(self, kind: str, repo_id: str) -> bool:
        """Make a repository with the Hub's first commit (.gitattributes); False where it exists already."""
        with self.lock:
            if self._record_path(kind, repo_id).exists():
                return False
            record = {"id": repo_id, "branches": {}, "tags": {}, "commits": {}}
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            files = {".gitattributes": self._add_blob(attributes.encode())}
            self._add_commit(record, "main", {"summary": "initial commit"}, files)
            self._save(kind, record)
            return True

    def resolve(self, kind: str, repo_id: str, revision: str) -> tuple[dict, str]:
        """The repository's record, and the commit that a branch, tag, `refs/...` name or commit hash means."""
        record = self.load(kind, repo_id)
        name = re.sub(r"^refs/(heads|tags)/", "", revision)
        sha = record["branches"].get(name) or record["tags"].get(name) or name
        if sha not in record["commits"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return record, sha

    def add_ref(self, kind: str, repo_id: str, group: str, name: str, revision: str) -> None:
        """Name a commit: `group` is "branches" or "tags"; a 409 HubError where the name is taken."""
        with self.lock:
            record, sha = self.resolve(kind, repo_id, revision)
            if name in record[group]:
                raise HubError(409, f"Reference already exists: {name}")
            record[group][name] = sha
            self._save(kind, record)

    def commit(self, kind: str, repo_id: str, branch: str, operations: list[dict]) -> str:
        """Apply the operations of a `/commit` request in order on top of a branch; returns the new commit's hash."""
        with self.lock:
            record, head = self.resolve(kind, repo_id, branch)
            if branch not in record["branches"]:
                raise HubError(404, f"Invalid rev id: {branch} is no branch", "RevisionNotFound")
            header = next(operation["value"] for operation in operations if operation["key"] == "header")
            if not head.startswith(header.get("parentCommit", head)):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(record["commits"][head]["files"])
            for operation in operations:
                if operation["key"] != "header":
                    self._apply(files, operation["key"], operation["value"])
            sha = self._add_commit(record, branch, header, files)
            self._save(kind, record)
            return sha

    def _apply(self, files: dict[str, dict], key: str, value: dict) -> None:
        path = value["path"].rstrip("/")
        if key == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md":
                front_matter(content.decode())  # the Hub refuses a card that it can't read
            files[path] = self._add_blob(content)
        elif key == "lfsFile":
            files[path] = self._lfs_entry(value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(path + "/")]
            if not gone or any(name not in files for name in gone):
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(501, f"The local hub has no commit operation {key!r}")

    def _add_blob(self, content: bytes) -> dict:
        digest = git_blob_id(content)
        if not (path := self.object_path(digest)).exists():  # somebody may be reading it
            path.write_bytes(content)
        return {"oid": digest, "size": len(content), "lfs": None}

    def _lfs_entry(self, digest: str) -> dict:
        path = self.object_path(digest)
        if not path.is_file():
            raise HubError(400, f"LFS object {digest} was not uploaded before the commit")
        size = path.stat().st_size
        return {"oid": git_blob_id(lfs_pointer(digest, size)), "size": size, "lfs": digest}

    def _add_commit(self, record: dict, branch: str, header: dict, files: dict[str, dict]) -> str:
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        commit = {"parent": record["branches"].get(branch), "title": header["summary"], "date": date, "files": files}
        commit["message"] = header.get("description", "")
        # The clock keeps commits of equal content apart.
        sha = hashlib.sha1(json.dumps([record["id"], commit, time.time_ns()]).encode()).hexdigest()
        record["commits"][sha] = commit
        record["branches"][branch] = sha
        return sha
