"""A local Hugging Face Hub: enough of its HTTP API for push_to_hub and from_pretrained to work unchanged.

It serves huggingface_hub, transformers, datasets and peft through HF_ENDPOINT, on loopback, for models and datasets.
Endpoints and headers are those that huggingface_hub 2.4 uses (its hf_api.py, _commit_api.py, lfs.py and
file_download.py). Large files go through git LFS' basic transfer to a second port, because the Hub's storage is
another host as well: clients follow the redirect there without their token. Xet, multipart upload, pull requests,
spaces and private repositories aren't served; an unknown route answers 501 and names itself.

By hand, from the repository root (Ctrl-C ends it, the folder keeps what was pushed)::

    python tests/hub_server.py --root /tmp/hub
    HF_ENDPOINT=http://127.0.0.1:PORT HF_HUB_DISABLE_XET=1 HF_TOKEN=anything python my_script.py
"""

import argparse
import hashlib
import json
import os
import re
import tempfile
import threading
import traceback
from base64 import b64decode
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote

from hub_store import LFS_SUFFIXES, HubError, HubStore, file_info, folder_info, folders_of, front_matter

USER = "tester"  # whom every token belongs to
PREFIXES = {"models": "", "datasets": "datasets/"}  # kind of repository -> how its page and file addresses begin
LFS_SIZE = 10 * 2**20  # bytes; the Hub takes nothing larger as a plain git blob
CHUNK = 2**20  # bytes read and written at a time


class Handler(BaseHTTPRequestHandler):
    """What both ports share: bodies in; JSON, files and byte ranges out; errors in the Hub's form."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: Nagle's algorithm would add 40 ms to an answer

    def __init__(self, *connection: Any, hub: "HubServer") -> None:
        self.hub = hub
        super().__init__(*connection)  # this already answers the connection's requests

    def log_message(self, format: str, *args: Any) -> None:
        if self.hub.verbose:
            super().log_message(format, *args)

    def handle_request(self) -> None:
        try:
            try:
                self.answer()
            except (HubError, ConnectionError):
                raise
            except Exception as error:  # a 5xx would make clients retry for half a minute before showing it
                raise HubError(400, "The local hub failed:\n" + traceback.format_exc()) from error
        except HubError as error:
            headers = {"X-Error-Message": error.message.replace("\n", " "), **error.headers}
            if self.command in ("POST", "PUT"):
                headers["Connection"] = "close"  # the body may not have been read
            if error.code:
                headers["X-Error-Code"] = error.code
            self.reply({"error": error.message}, error.status, headers)
        except ConnectionError:
            self.close_connection = True  # the client went away in the middle of an answer

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self) -> None:
        raise NotImplementedError

    def chunks(self) -> Iterator[bytes]:
        """The request's body in pieces."""
        if "Transfer-Encoding" in self.headers:
            raise HubError(411, "The local hub needs a Content-Length, not chunks")  # no client of ours sends them
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read(min(left, CHUNK))
            if not chunk:
                raise HubError(400, f"The request ended {left} bytes short of its Content-Length")
            left -= len(chunk)
            yield chunk

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_head(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def reply_file(self, path: Path, headers: dict[str, str]) -> None:
        """A file, or the part of it that a Range header asks for (datasets reads Parquet in ranges)."""
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            start = int(first) if first else max(size - int(last), 0)  # "-n" asks for the last n bytes
            stop = min(int(last) + 1, size) if first and last else size
            if start >= stop:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
        self.send_head(status, headers, stop - start)
        if self.command != "HEAD":
            with path.open("rb") as file:
                file.seek(start)
                while left := stop - file.tell():
                    self.wfile.write(file.read(min(left, CHUNK)))


class StorageHandler(Handler):
    """The second port: contents by sha256. Nobody logs in here, as at the Hub's signed addresses."""

    def answer(self) -> None:
        digest = self.path.lstrip("/")
        path = self.hub.store.object_path(digest)
        if "Authorization" in self.headers:
            raise HubError(403, "A token was sent to the storage host: it must stay with the Hub")
        if self.command == "PUT":
            self.receive(digest, path)
            self.reply({}, headers={"ETag": f'"{digest}"'})
        elif path.is_file():
            self.reply_file(path, {"ETag": f'"{digest}"'})
        else:
            raise HubError(404, f"No object {digest}")

    def receive(self, digest: str, path: Path) -> None:
        hasher = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            for chunk in self.chunks():
                hasher.update(chunk)
                file.write(chunk)
        if hasher.hexdigest() != digest:
            os.unlink(file.name)
            raise HubError(400, f"The content sent as {digest} hashes to {hasher.hexdigest()}")
        os.replace(file.name, path)


class HubHandler(Handler):
    """The Hub's own port: `/api/...`, git LFS' batch and verify, `/USER/NAME/resolve/REVISION/PATH`."""

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        parts = [unquote(part) for part in path.split("/") if part]  # split first: a revision may hold a quoted /
        self.query, self.body = parse_qs(query), b"".join(self.chunks())
        if parts[:1] == ["api"]:
            self.answer_api(parts[1:])
            return
        kind = parts.pop(0) if parts[:1] == ["datasets"] else "models"
        start = 1 if parts[1:2] == ["resolve"] else 2  # an id of one word, as `gpt2`: never found here
        repo_id, rest = "/".join(parts[:start]), parts[start:]
        if self.command in ("GET", "HEAD") and rest[:1] == ["resolve"]:
            self.resolve(kind, repo_id, rest[1], "/".join(rest[2:]))
        elif self.command == "POST" and rest[:3] == ["info", "lfs", "objects"]:
            self.check_token()
            {"batch": self.lfs_batch, "verify": self.lfs_verify}[rest[3]](kind, repo_id.removesuffix(".git"))
        else:
            self.refuse_route()

    def answer_api(self, parts: list[str]) -> None:
        if page := PAGES.get((self.command, "/".join(parts))):
            page(self)
            return
        start = 2 if (self.command, *parts[2:3]) in REPO_PAGES else 3  # as above
        repo_id, rest = "/".join(parts[1:start]), parts[start:] or ["revision"]
        repo_page = REPO_PAGES.get((self.command, rest[0]))
        if not repo_id or parts[0] not in PREFIXES or repo_page is None:
            self.refuse_route()
        if self.command == "POST" and rest[0] != "paths-info":
            self.check_token()
        repo_page(self, parts[0], repo_id, rest[1] if rest[1:] else "main", "/".join(rest[2:]))

    def refuse_route(self) -> NoReturn:
        raise HubError(501, f"The local hub doesn't serve {self.command} {self.path}")

    def check_token(self) -> None:
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            raise HubError(401, "Invalid username or password.")

    def whoami(self) -> None:
        self.check_token()
        auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
        self.reply({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def create_repo(self) -> None:
        self.check_token()
        wanted = json.loads(self.body)
        kind = wanted.get("type", "model") + "s"
        if kind not in PREFIXES:
            raise HubError(501, f"The local hub has no repositories of type {wanted['type']!r}")
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        content = {"url": f"{self.hub.endpoint}/{PREFIXES[kind]}{repo_id}", "name": repo_id}
        if self.hub.store.create(kind, repo_id):
            self.reply(content)
        else:
            self.reply({"error": "You already created this repo", **content}, 409)

    def validate_yaml(self) -> None:
        try:
            metadata = front_matter(json.loads(self.body)["content"])
        except HubError as error:
            self.reply({"errors": [{"message": error.message}], "warnings": []}, error.status)
            return
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.reply({"errors": [], "warnings": warnings})

    def repo_info(self, kind: str, repo_id: str, revision: str, _: str) -> None:
        record, sha = self.hub.store.resolve(kind, repo_id, revision)
        files, siblings, card = record["commits"][sha]["files"], [], {}
        for path in sorted(files):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                info = file_info(record, sha, path)
                siblings[-1] |= {"size": info["size"], "blobId": info["oid"], "lfs": info.get("lfs")}
        if "README.md" in files:
            card = front_matter(self.hub.store.object_path(files["README.md"]["oid"]).read_text(encoding="utf-8"))
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "siblings": siblings, "cardData": card}
        info |= {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        info |= {"lastModified": record["commits"][sha]["date"], "tags": card.get("tags") or []}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        self.reply(info)

    def refs(self, kind: str, repo_id: str, *_: str) -> None:
        record = self.hub.store.load(kind, repo_id)

        def listed(group: str, folder: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c} for n, c in record[group].items()]

        self.reply({"branches": listed("branches", "heads"), "tags": listed("tags", "tags"), "converts": []})

    def commits(self, kind: str, repo_id: str, revision: str, _: str) -> None:
        record, sha = self.hub.store.resolve(kind, repo_id, revision)
        history = []
        while sha:
            commit = record["commits"][sha]
            shown = {key: commit[key] for key in ("title", "message", "date")}
            history.append({"id": sha, "authors": [{"user": USER}], **shown})
            sha = commit["parent"]
        self.reply(history)

    def tree(self, kind: str, repo_id: str, revision: str, folder: str) -> None:
        record, sha = self.hub.store.resolve(kind, repo_id, revision)
        files = record["commits"][sha]["files"]
        prefix = f"{folder}/" if folder else ""
        if folder and folder not in folders_of(files):
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive", [""])[0].lower() == "true"

        def shown(path: str) -> bool:
            return path.startswith(prefix) and (deep or "/" not in path.removeprefix(prefix))

        entries = [folder_info(files, path) for path in sorted(folders_of(files)) if shown(path)]
        self.reply(entries + [file_info(record, sha, path) for path in sorted(files) if shown(path)])

    def paths_info(self, kind: str, repo_id: str, revision: str, _: str) -> None:
        record, sha = self.hub.store.resolve(kind, repo_id, revision)
        files = record["commits"][sha]["files"]
        paths = [path.rstrip("/") for path in parse_qs(self.body.decode()).get("paths", [])]
        entries = [file_info(record, sha, path) for path in paths if path in files]
        self.reply(entries + [folder_info(files, path) for path in paths if path in folders_of(files)])

    def preupload(self, kind: str, repo_id: str, revision: str, _: str) -> None:
        """Says of each file whether it goes through LFS, and its present hash, so that clients skip equal files."""
        record, sha = self.hub.store.resolve(kind, repo_id, revision)
        files, answers = record["commits"][sha]["files"], []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in b64decode(file["sample"])
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE or binary
            present = files.get(file["path"], {"lfs": None, "oid": None})
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": present["lfs"] or present["oid"]})
        self.reply({"files": answers})

    def commit(self, kind: str, repo_id: str, revision: str, _: str) -> None:
        if "create_pr" in self.query:
            raise HubError(501, "The local hub has no pull requests: push without create_pr")
        operations = [json.loads(line) for line in self.body.splitlines() if line]
        sha = self.hub.store.commit(kind, repo_id, revision, operations)
        url = f"{self.hub.endpoint}/{PREFIXES[kind]}{repo_id}/commit/{sha}"
        self.reply({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def create_branch(self, kind: str, repo_id: str, branch: str, _: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self.hub.store.add_ref(kind, repo_id, "branches", branch, start)
        self.reply({})

    def create_tag(self, kind: str, repo_id: str, revision: str, _: str) -> None:
        self.hub.store.add_ref(kind, repo_id, "tags", json.loads(self.body)["tag"], revision)
        self.reply({})

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        """Where to upload each object; nothing for those that are here already."""
        self.hub.store.load(kind, repo_id)
        verify = f"{self.hub.endpoint}/{PREFIXES[kind]}{repo_id}.git/info/lfs/objects/verify"
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.store.object_path(wanted["oid"]).is_file():
                upload = {"href": f"{self.hub.storage_endpoint}/{wanted['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": verify}}
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_verify(self, kind: str, repo_id: str) -> None:
        wanted = json.loads(self.body)
        path = self.hub.store.object_path(wanted["oid"])
        if not path.is_file() or path.stat().st_size != wanted["size"]:
            raise HubError(404, f"Object {wanted['oid']} of {wanted['size']} bytes didn't arrive")
        self.reply({})

    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        record, sha = self.hub.store.resolve(kind, repo_id, revision)
        headers = {"X-Repo-Commit": sha}
        entry = record["commits"][sha]["files"].get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if digest := entry["lfs"]:
            headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": f'"{digest}"'}
            self.send_head(302, {**headers, "Location": f"{self.hub.storage_endpoint}/{digest}"}, 0)
        else:
            self.reply_file(self.hub.store.object_path(entry["oid"]), {**headers, "ETag": f'"{entry["oid"]}"'})


PAGES: dict[tuple[str, str], Callable[[HubHandler], None]] = {
    ("GET", "whoami-v2"): HubHandler.whoami,
    ("POST", "repos/create"): HubHandler.create_repo,
    ("POST", "validate-yaml"): HubHandler.validate_yaml,
}
# Below /api/KIND/USER/NAME/ACTION/REVISION/PATH; without an action: `revision` of main.
REPO_PAGES: dict[tuple[str, str], Callable[[HubHandler, str, str, str, str], None]] = {
    ("GET", "revision"): HubHandler.repo_info,
    ("GET", "refs"): HubHandler.refs,
    ("GET", "commits"): HubHandler.commits,
    ("GET", "tree"): HubHandler.tree,
    ("POST", "paths-info"): HubHandler.paths_info,
    ("POST", "preupload"): HubHandler.preupload,
    ("POST", "commit"): HubHandler.commit,
    ("POST", "branch"): HubHandler.create_branch,
    ("POST", "tag"): HubHandler.create_tag,
}


class HubServer:
    """The two ports over one folder; a context manager that serves while it is entered.

    Args:
        root: Folder of the repositories, made if missing; a later server over it serves what was pushed before.
        verbose: Print each request to stderr.

    Attributes:
        endpoint: What HF_ENDPOINT must be set to.
        storage_endpoint: Where LFS contents are uploaded and downloaded.
    """

    def __init__(self, root: Path, verbose: bool = False) -> None:
        self.root, self.verbose = root, verbose
        self.store = HubStore(root)
        handlers = [partial(handler, hub=self) for handler in (HubHandler, StorageHandler)]
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in handlers]
        self.endpoint, self.storage_endpoint = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a local Hugging Face Hub until Ctrl-C.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories, made if missing")
    parser.add_argument("--verbose", action="store_true", help="print each request to stderr")
    options = parser.parse_args()
    with HubServer(options.root, options.verbose) as server:
        print(server.endpoint, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
