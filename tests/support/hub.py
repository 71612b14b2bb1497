"""A Hub that is a small HTTP server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from support.paths import ROOT


class Hub:
    """The endpoints huggingface_hub needs to describe, list and download a model.

    ``repos`` has the commits by repository and revision, ``folders`` the files by commit, and
    ``marks`` the bytes sent by file name, one entry a command line.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, str]] = {}
        self.folders: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.sent: dict[str, int] = {}
        self.marks: list[dict[str, int]] = []
        self.closed = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/mark/"):
            self.marks.append(self.sent)
            self.sent = {}
            send(request, 200, b"", {}, body)
        elif path.startswith("/api/models/"):
            self.api(request, path[len("/api/models/") :], body)
        elif "/resolve/" in path:
            self.resolve(request, path[1:], body)
        else:
            send(request, 404, b"", {}, body)

    def api(self, request: BaseHTTPRequestHandler, path: str, body: bool) -> None:
        repo = "/".join(path.split("/")[:2])
        kind, _, revision = path[len(repo) + 1 :].partition("/")
        if repo in self.broken:
            send(request, 500, b"{}", {}, body)
            return
        if repo not in self.repos:
            send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            return
        revision = revision or "main"
        commit = self.repos[repo].get(revision, revision if revision in self.folders else "")
        if not commit:
            send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            return
        folder = self.folders[commit]
        if kind == "tree":
            found: Any = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": etag(path)}
                for path in sorted(folder.iterdir())
            ]
        else:
            found = {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": False,
                "siblings": [
                    {"rfilename": path.name, "size": path.stat().st_size, "blobId": etag(path)}
                    for path in sorted(folder.iterdir())
                ],
            }
        send(request, 200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)

    def resolve(self, request: BaseHTTPRequestHandler, path: str, body: bool) -> None:
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = self.repos.get(repo, {}).get(revision, revision)
        if repo in self.gated:
            send(request, 403, b"", {"X-Error-Code": "GatedRepo"}, body)
            return
        if commit not in self.folders or not (self.folders[commit] / name).is_file():
            send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        file = self.folders[commit] / name
        data = file.read_bytes()
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, wanted = 200, request.headers.get("Range", "")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            status, data = 206, data[int(start) : last + 1]
        if body:
            self.sent[name] = self.sent.get(name, 0) + len(data)
        send(request, status, data, headers, body)

    def close(self) -> None:
        if not self.closed:
            self.server.shutdown()
            self.server.server_close()
        self.closed = True


def send(
    request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], body: bool
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if body:
        request.wfile.write(data)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


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
