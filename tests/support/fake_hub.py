"""A Hub on localhost which keeps what is uploaded to it: enough for create_repo, upload_folder, ModelCard.load and push."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

COMMIT = "0" * 39 + "1"
Files = dict[str, dict[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    files: Files
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body, parts = self._body(), self.path.strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            name = "me/" + json.loads(body)["name"]
            self.files.setdefault(name, {})
            return self._reply(json.dumps({"url": f"http://{self.headers['Host']}/{name}", "id": name}).encode())
        if parts[1] == "validate-yaml":
            header = json.loads(body)["content"].split("\n---", 1)[0].removeprefix("---")
            try:
                yaml.safe_load(header)  # as strict as the Hub: no Python objects
            except yaml.YAMLError as error:
                return self._reply(json.dumps({"errors": [{"message": str(error)}]}).encode(), 400)
            return self._reply(b"{}")
        repo, what = "/".join(parts[2:4]), parts[4]
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
            return self._reply(json.dumps({"files": modes}).encode())
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files.setdefault(repo, {})[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            return self._reply(json.dumps({"success": True, "commitUrl": url, "commitOid": COMMIT}).encode())
        return self._reply(b"{}", 404)

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._reply(json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}).encode())
        content = self.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if content is None:
            return self._reply(b"", 404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(content).hexdigest()
        return self._reply(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Content_Type="text/plain")

    do_HEAD = do_GET


@contextmanager
def fake_hub() -> Iterator[tuple[str, Files]]:
    """The address of a running Hub, and repository -> path -> content as uploaded."""
    files: Files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
