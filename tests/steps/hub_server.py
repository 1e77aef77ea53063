"""A server on loopback in the Hugging Face hub's layout: listings by revision, files by commit, ranges, large files."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = 10_000


@dataclass
class Hub:
    """Repositories by `models/ORG/NAME` or `datasets/ORG/NAME`, and what was asked of them."""

    url: str = ""
    repositories: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    break_off_at: int = 0
    """Bytes after which the next large file's connection is cut, once."""
    wrong_bytes: bool = False

    def add(self, name: str, files: Mapping[str, bytes]) -> str:
        """Publish a new commit on `main`; return it."""
        content = b"".join(key.encode() + value for key, value in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.repositories[f"{name}@{commit}"] = (commit, dict(files))
        self.branches[name] = commit
        return commit

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.branches.get(name, "") if revision == "main" else revision
        return self.repositories.get(f"{name}@{revision}")


def _entry(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if len(content) > _LARGE:
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((path, dict(self.headers)))
            if path.startswith("/api/"):
                kind, _, rest = path.removeprefix("/api/").partition("/")
                name, _, revision = rest.partition("/revision/")
                self.listing(hub.find(f"{kind}/{name}", revision))
            else:
                kind = "datasets" if path.startswith("/datasets/") else "models"
                name, _, rest = path.removeprefix("/datasets").strip("/").partition("/resolve/")
                revision, _, file = rest.partition("/")
                found = hub.find(f"{kind}/{name}", revision)
                self.file(found[1].get(file) if found else None)

        def listing(self, found: tuple[str, dict[str, bytes]] | None) -> None:
            if found is None:
                return self.answer(404, b"{}")
            commit, files = found
            body = {"sha": commit, "siblings": [_entry(name, content) for name, content in files.items()]}
            self.answer(200, json.dumps(body).encode())

        def file(self, content: bytes | None) -> None:
            if content is None:
                return self.answer(404, b"")
            if hub.wrong_bytes:
                content = content[::-1]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            if start >= len(content) > 0:
                return self.answer(416, b"")
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
            self.answer(206 if start else 200, content[start:], headers)

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if hub.break_off_at and len(body) > _LARGE:
                self.wfile.write(body[: hub.break_off_at])
                hub.break_off_at = 0
                self.close_connection = True
                return
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve on a free port of loopback until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
