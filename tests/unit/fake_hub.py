"""A Hugging Face hub on loopback: what the hub library asks of it, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")  # in Git LFS there, so with a SHA-256
# What the real hub answers, by the name of the fault: status and X-Error-Code.
REFUSALS = {
    "missing": (404, "RepoNotFound"),
    "private": (401, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "token": (401, ""),
    "forbidden": (403, ""),
    "busy": (429, ""),
    "down": (503, ""),
    "nothing": (404, ""),
}


class FakeHub:
    """Serves repositories from memory in threads of this process. Large files lie on a storage server of another
    origin, to which the hub redirects.

    requests: "METHOD path" of each, in order, with the range if one is asked for. Paths on the storage: /storage/...
    tokens: what "hub" and "storage" were given as Authorization.
    refuse: "api" or "files" -> a fault of REFUSALS.
    sent: bytes of files that were sent, by path.
    cut: path of a file -> bytes after which its next transfer breaks, and how: "close", "reset" or "stall".
    """

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.revisions: dict[tuple[str, str], str] = {}
        self.requests: list[str] = []
        self.tokens: dict[str, set[str | None]] = {"hub": set(), "storage": set()}
        self.sent = Counter[str]()
        self.refuse: dict[str, str] = {}
        self.cut: dict[str, tuple[int, str]] = {}
        self.html = False
        self.served = dict[str, bytes]()  # a file whose content is another than the listing says
        self.resume = True
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in self.tokens]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        self.threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in self.servers]
        for thread in self.threads:
            thread.start()

    def push(self, repository: str, files: dict[str, bytes], *revisions: str) -> str:
        """A commit of these files; `revisions`, main by default, name it from now on."""
        commit = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = files
        for revision in (*(revisions or ("main",)), commit):
            self.revisions[repository, revision] = commit
        return commit

    def fetched(self, method: str = "GET") -> list[str]:
        """Paths of the files that were asked for since `forget`, sorted."""
        found = (re.fullmatch(rf"{method} /\w+/\w+/resolve/\w+/(\S+).*", line) for line in self.requests)
        return sorted(match[1] for match in found if match)

    def forget(self) -> None:
        self.requests.clear()
        self.sent.clear()

    def close(self) -> None:
        self.closing.set()
        for server, thread in zip(self.servers, self.threads):
            server.shutdown()
            server.server_close()
            thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {path}" + (f" {asked}" if asked else ""))
        self.hub.tokens["storage" if path.startswith("/storage/") else "hub"].add(self.headers.get("Authorization"))
        if self.hub.html:
            return self._send(200, b"<html>welcome</html>", {"Content-Type": "text/html"})
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/revision/(.+)", path):
            return self._repository(match[1], match[2])
        if match := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path):
            return self._file(match[2], match[3])
        if match := re.fullmatch(r"/storage/(\w+)/(.+)", path):
            return self._content(self.hub.commits[match[1]][match[2]], match[2], {})
        self._send(404, b"")

    def _repository(self, repository: str, revision: str) -> None:
        if fault := self.hub.refuse.get("api"):
            return self._refuse(fault)
        if not any(name == repository for name, _ in self.hub.revisions):
            return self._refuse("missing")
        if (commit := self.hub.revisions.get((repository, revision))) is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path, content in self.hub.commits[commit].items():
            siblings.append({"rfilename": path, "size": len(content), "blobId": _etag("", content)})
            if path.endswith(LARGE):
                lfs = {"sha256": _etag(path, content), "size": len(content), "pointerSize": 134}
                siblings[-1]["lfs"] = lfs
        answer = {"id": repository, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, commit: str, path: str) -> None:
        if fault := self.hub.refuse.get("files"):
            return self._refuse(fault)
        content = self.hub.commits.get(commit, {}).get(path)
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            linked = {"X-Linked-ETag": f'"{_etag(path, content)}"', "X-Linked-Size": str(len(content))}
            return self._send(
                302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/storage/{commit}/{path}"}
            )
        self._content(content, path, headers)

    def _content(self, content: bytes, path: str, headers: dict) -> None:
        headers = {**headers, "ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"}
        content = self.hub.served.get(path, content)
        start, end, status = 0, len(content), 200
        if self.hub.resume and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, status = int(match[1]), 206
            end = min(end, int(match[2]) + 1) if match[2] else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        cut = self.hub.cut.pop(path, None) if self.command == "GET" else None
        if self.command == "GET":
            self.hub.sent[path] += end - start
        self._send(status, content[start:end], headers, cut)

    def _refuse(self, fault: str) -> None:
        status, code = REFUSALS[fault]
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict | None = None, cut: tuple[int, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body[: cut[0]] if cut else body)
        except OSError:  # the client was killed
            cut = cut or (0, "close")
        if cut:
            self._break(cut[1])

    def _break(self, how: str) -> None:
        if how == "stall":
            self.hub.closing.wait(60)
        if how == "reset":
            time.sleep(1)  # a reset discards what the client has not read
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # the server would end the connection in order first
        self.close_connection = True


def _etag(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
