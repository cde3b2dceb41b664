"""A hub on this machine: what huggingface_hub asks of one, from folders, with every request counted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    """`models` are folders by OWNER/NAME; `gated` are names whose files nobody gets; `asked` counts "GET PATH"."""

    daemon_threads = True

    def __init__(self, models: Mapping[str, Path], gated: frozenset[str] = frozenset()) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.models, self.gated, self.asked = dict(models), gated, Counter[str]()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def got(self, file: str) -> int:
        """How often the content of a file was fetched."""
        return sum(many for line, many in self.asked.items() if line.startswith("GET ") and line.endswith(f"/{file}"))


def commit_of(folder: Path) -> str:
    """Another content is another commit."""
    content = b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))
    return hashlib.sha1(content).hexdigest()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        with self.server.lock:
            self.server.asked[f"{self.command} {path}"] += 1
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.server.models:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        folder = self.server.models[name]
        commit = commit_of(folder)
        if path.startswith("/api/"):
            found: object = {"id": name, "sha": commit, "siblings": []}
            if rest[:1] == ["tree"]:
                files = [path for path in sorted(folder.iterdir()) if path.is_file()]
                found = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)}
                    for file in files
                ]
            return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        if name in self.server.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        file = folder / rest[2]
        self._send(200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_oid(file)}"'})

    def _send(self, code: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(models: Mapping[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[Hub]:
    with Hub(models, gated) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()


def variables(url: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a program that uses this hub, and a cache of its own."""
    named = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_HOME", "LPTRANSFORMER_HUB_COMMITS")
    kept = {key: value for key, value in os.environ.items() if key not in named}
    return {**kept, "HF_ENDPOINT": url, "HF_HOME": str(home), **more}
