"""A Hub that is a small HTTP server on this machine, for the real huggingface_hub client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from support.paths import ROOT

#: What the Hub stores with LFS, of files that bring no .gitattributes.
_LFS = re.compile(r".*\.(safetensors|bin|npz)$|tokenizer\.model$")


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def git(self) -> str:
        """The name git has for it: of its bytes, or of the pointer that stands for them."""
        data = self.data
        if self.lfs:
            data = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
                f"size {len(self.data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git


@dataclass
class Repo:
    """Commits by their hash, and what branches and pull requests point to."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    pulls: int = 0

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.refs.get(revision, revision)]

    def commit(self, ref: str, files: Mapping[str, Blob], oid: str | None = None) -> str:
        text = json.dumps(
            [ref, len(self.commits), {name: blob.git for name, blob in files.items()}]
        )
        oid = oid or hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[ref] = oid
        return oid


@dataclass
class Fault:
    """What happens to requests whose ``METHOD path`` a pattern finds, after ``skip`` of them.

    ``error``: an answer of that status and ``headers``, whose text repeats the request's
    authorization. ``cut``:
    half the body, then the connection ends. ``hang``: no answer. ``damage``: a byte of the body is
    another. ``call``: an answer as always, after a call.
    """

    pattern: str
    how: Literal["error", "cut", "hang", "damage", "call"]
    skip: int = 0
    times: int = 1
    status: int = 503
    call: Callable[[], object] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818 (an answer, not a mistake)
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


class Hub:
    """The endpoints huggingface_hub needs to describe, list, download and upload a model.

    ``sent`` has the bytes of bodies sent by file name, ``got`` those received by LFS object,
    ``marks`` what was sent up to each ``/mark/``, ``log`` every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.broken: set[str] = set()
        self.faults: list[Fault] = []
        self.sent: dict[str, int] = {}
        self.got: dict[str, int] = {}
        self.marks: list[dict[str, int]] = []
        self.log: list[str] = []
        #: Requests to where LFS objects are kept that brought a token, which is for the Hub alone.
        self.leaks: list[str] = []
        self.closed = False
        self.lock = threading.Lock()
        self.released = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(Request(self))

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Of a client that was killed."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        #: The same server by another name, which is another host to a client.
        self.storage = f"http://localhost:{port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(
        self,
        repo: str,
        folder: Path | None = None,
        revision: str = "main",
        oid: str | None = None,
        **about: Any,
    ) -> Repo:
        """Makes a repository, or a revision of it, of the files in a folder."""
        found = self.repos.setdefault(repo, Repo())
        files = {}
        for path in sorted(folder.rglob("*")) if folder else ():
            if path.is_file():
                name = path.relative_to(folder or path).as_posix()
                files[name] = Blob(path.read_bytes(), bool(_LFS.match(name)))
        with self.lock:
            found.commit(revision, files, oid)
            for blob in files.values():
                if blob.lfs:
                    self.objects[blob.sha256] = blob.data
        for name, value in about.items():
            setattr(found, name, value)
        return found

    def close(self) -> None:
        if not self.closed:
            self.released.set()
            self.server.shutdown()
            self.server.server_close()
        self.closed = True

    # --- requests ---------------------------------------------------------------------------------

    def answer(self, request: Request) -> None:
        request.read()
        if request.path.startswith("/mark/"):
            self.marks.append(self.sent)
            self.sent = {}
            request.send(200)
            return
        fault = self._fault(request)
        if fault is not None and fault.how == "hang":
            self.released.wait(60)
            request.drop()
            return
        if fault is not None and fault.how == "error":
            said = f"no luck with {request.headers.get('Authorization')}"
            headers = {"X-HF-Warning": said, **fault.headers}
            request.send(fault.status, json.dumps({"error": said}).encode(), headers)
            return
        if fault is not None and fault.call is not None:
            fault.call()
        request.fault = fault
        try:
            with self.lock:
                status, data, headers, name = self._answered(request)
        except Refused as refused:
            request.send(refused.status, b"{}", refused.headers)
            return
        sent = request.send(status, data, headers)
        with self.lock:
            self.sent[name] = self.sent.get(name, 0) + sent

    def _fault(self, request: Request) -> Fault | None:
        line = f"{request.method} {request.path}"
        with self.lock:
            self.log.append(line)
            for fault in self.faults:
                if not re.search(fault.pattern, line):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None

    def _answered(self, request: Request) -> tuple[int, bytes, dict[str, str], str]:
        path = request.path
        if path.startswith("/objects/"):
            return self._object(request, path.rpartition("/")[2])
        if path == "/api/repos/create":
            return self._json(self._create(request))
        if path == "/api/validate-yaml":
            good = request.json["content"].startswith("---\n")
            return self._json({"errors": [], "warnings": []}, 200 if good else 400)
        if path.startswith("/api/models/"):
            return self._json(self._api(request, path.removeprefix("/api/models/")))
        if path.endswith(".git/info/lfs/objects/batch"):
            self._writes(request)
            return self._json(self._batch(request))
        if "/resolve/" in path:
            return self._resolve(request)
        raise Refused(404)

    def _json(self, value: Any, status: int = 200) -> tuple[int, bytes, dict[str, str], str]:
        return status, json.dumps(value).encode(), {"Content-Type": "application/json"}, ""

    def _token(self, request: Request) -> bool:
        return request.headers.get("Authorization", "").removeprefix("Bearer ") in self.tokens

    def _writes(self, request: Request) -> None:
        if not self._token(request):
            raise Refused(401, message="Invalid credentials in Authorization header")

    def _repo(self, request: Request, name: str) -> Repo:
        if name in self.broken:
            raise Refused(500)
        found = self.repos.get(name)
        if found is None or (found.private and not self._token(request)):
            raise Refused(401 if found else 404, "RepoNotFound")
        return found

    def _revision(self, repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound")
        return oid

    def _create(self, request: Request) -> Any:
        self._writes(request)
        asked = request.json
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if name in self.repos:
            raise Refused(409, message="You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[name] = Repo(private=private)
        start = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.repos[name].commit("main", {".gitattributes": Blob(start, False)})
        return {"url": f"{self.url}/{name}", "name": name}

    def _api(self, request: Request, path: str) -> Any:
        repo_id = "/".join(path.split("/")[:2])
        kind, _, rest = path[len(repo_id) + 1 :].partition("/")
        rest, _, folder = rest.partition("/")  # a slash of a revision is quoted
        repo, revision = self._repo(request, repo_id), unquote(rest or "main")
        if request.method == "POST":
            self._writes(request)
        if kind == "branch":
            if revision in repo.refs:
                raise Refused(409, message="Reference already exists")
            start = request.json.get("startingPoint", "main")
            repo.refs[revision] = self._revision(repo, start)
            return {}
        if kind == "tree":
            files = repo.commits[self._revision(repo, revision)]
            if folder:
                start = f"{unquote(folder)}/"
                files = {name: blob for name, blob in files.items() if name.startswith(start)}
                if not files:
                    raise Refused(404, "EntryNotFound")
            return _tree(files)
        oid = self._revision(repo, revision)
        if kind == "preupload":
            return {"files": [_mode(file, repo.commits[oid]) for file in request.json["files"]]}
        if kind == "commit":
            return self._commit(request, repo_id, repo, revision)
        return {
            "_id": "1",
            "id": repo_id,
            "modelId": repo_id,
            "sha": oid,
            "private": repo.private,
            "siblings": [_sibling(name, blob) for name, blob in repo.commits[oid].items()],
        }

    def _batch(self, request: Request) -> Any:
        found = []
        for item in request.json["objects"]:
            oid = item["oid"]
            if oid not in self.objects:
                item["actions"] = {"upload": {"href": f"{self.storage}/objects/{oid}?signed=1"}}
            found.append(item)
        return {"transfer": "basic", "objects": found}

    def _commit(self, request: Request, name: str, repo: Repo, revision: str) -> Any:
        lines = [json.loads(line) for line in request.body.splitlines()]
        files = dict(repo.commits[repo.refs[revision]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                parent = value.get("parentCommit")
                if parent is not None and parent != repo.refs[revision]:
                    raise Refused(412, message="A commit has happened since")
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, message=f"no object {value['oid']}")
                files[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        found = {"success": True}
        if "create_pr" in request.query:
            repo.pulls += 1
            revision = f"refs/pr/{repo.pulls}"
            found["pullRequestUrl"] = f"{self.url}/{name}/discussions/{repo.pulls}"
        oid = repo.commit(revision, files)
        return found | {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}

    def _object(self, request: Request, oid: str) -> tuple[int, bytes, dict[str, str], str]:
        if "Authorization" in request.headers:
            self.leaks.append(request.path)
        if request.method == "PUT":
            self.got[oid] = self.got.get(oid, 0) + len(request.body)
            if hashlib.sha256(request.body).hexdigest() != oid:
                raise Refused(400, message="the bytes are not those of the object")
            self.objects[oid] = request.body
            return 200, b"", {}, ""
        if oid not in self.objects:
            raise Refused(404, "EntryNotFound")
        return _ranged(request, self.objects[oid], {"ETag": f'"{oid}"'}, request.query["name"][0])

    def _resolve(self, request: Request) -> tuple[int, bytes, dict[str, str], str]:
        name, _, rest = request.path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo, file = self._repo(request, name), unquote(file)
        if repo.gated:
            raise Refused(403, "GatedRepo")
        oid = self._revision(repo, unquote(revision))
        blob = repo.commits[oid].get(file)
        if blob is None:
            raise Refused(404, "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"'}
        if blob.lfs:
            headers |= {
                "Location": f"{self.storage}/objects/{blob.sha256}?name={file}",
                "X-Linked-ETag": f'"{blob.sha256}"',
                "X-Linked-Size": str(len(blob.data)),
            }
            return 302, b"", headers, ""
        return _ranged(request, blob.data, headers, file)


class Request:
    """A request, read whole, and where its answer goes."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.handler = handler
        self.method, self.headers = handler.command, handler.headers
        url = urlsplit(handler.path)
        self.path, self.query = url.path, parse_qs(url.query)
        self.body = b""
        self.fault: Fault | None = None

    def read(self) -> None:
        source = self.handler.rfile
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(source.readline(), 16):
                self.body += source.read(size)
                source.readline()
            source.readline()
        else:
            self.body = source.read(int(self.headers.get("Content-Length", 0)))

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def send(self, status: int, data: bytes = b"", headers: Mapping[str, str] | None = None) -> int:
        """Answers; returns how many bytes of ``data`` were sent."""
        fault, length = self.fault, len(data)
        if fault is not None and fault.how == "damage" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault is not None and fault.how == "cut":
            data = data[: length // 2]
        handler = self.handler
        try:
            handler.send_response(status)
            for name, value in (headers or {}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(length))
            handler.end_headers()
            if self.method == "HEAD":
                return 0
            handler.wfile.write(data)
        except OSError:  # whoever asked is gone
            handler.close_connection = True
            return 0
        if len(data) < length:
            self.drop()
        return len(data)

    def drop(self) -> None:
        self.handler.close_connection = True


def _ranged(
    request: Request, data: bytes, headers: dict[str, str], name: str
) -> tuple[int, bytes, dict[str, str], str]:
    headers["Accept-Ranges"] = "bytes"
    wanted = request.headers.get("Range", "")
    if not wanted:
        return 200, data, headers, name
    start, _, end = wanted.removeprefix("bytes=").partition("-")
    last = min(int(end or len(data) - 1), len(data) - 1)
    if int(start) > last:
        raise Refused(416)
    headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
    return 206, data[int(start) : last + 1], headers, name


def _lfs(blob: Blob, key: str) -> dict[str, Any]:
    if not blob.lfs:
        return {}
    return {"lfs": {key: blob.sha256, "size": len(blob.data), "pointerSize": 134}}


def _tree(files: Mapping[str, Blob]) -> list[dict[str, Any]]:
    folders = {name.rpartition("/")[0] for name in files if "/" in name}
    return [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)] + [
        {"type": "file", "path": name, "size": len(blob.data), "oid": blob.git} | _lfs(blob, "oid")
        for name, blob in files.items()
    ]


def _sibling(name: str, blob: Blob) -> dict[str, Any]:
    about = {"rfilename": name, "size": len(blob.data), "blobId": blob.git}
    return about | _lfs(blob, "sha256")


def _mode(file: Mapping[str, Any], there: Mapping[str, Blob]) -> dict[str, Any]:
    name = file["path"]
    lfs = bool(_LFS.match(name)) or file["size"] > 10_000_000
    found = {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
    return found | ({"oid": there[name].etag} if name in there else {})


def hub_environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process whose Hub is ``hub`` and whose cache is in ``home``."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")
    }
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }


def use_hub(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``hub`` the Hub of this process, and ``home`` where its cache and token are."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 1,
        "HF_HUB_DOWNLOAD_TIMEOUT": 1,
    }.items():
        monkeypatch.setattr(constants, name, value)


def _serve(arguments: list[str]) -> int:
    """``hub.py org/name=FOLDER ... -- COMMAND``: runs a command, whose Hub has those folders."""
    split = arguments.index("--")
    hub = Hub()
    hub.tokens.add("a-token")
    for pair in arguments[:split]:
        repo, _, folder = pair.partition("=")
        hub.add(repo, Path(folder))
    with tempfile.TemporaryDirectory() as home:
        environment = hub_environment(hub, Path(home), HF_TOKEN="a-token")
        del environment["PYTHONPATH"]  # the command runs what is installed, not this checkout
        proxies = {
            name: value for name, value in os.environ.items() if name[-6:].lower() == "_proxy"
        }
        environment |= proxies | {"NO_PROXY": "127.0.0.1,localhost"}  # pip may need them
        code = subprocess.run(arguments[split + 1 :], env=environment).returncode
    hub.close()
    return code


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1:]))
