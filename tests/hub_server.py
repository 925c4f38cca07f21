"""A small stand-in for the Hugging Face Hub on 127.0.0.1: enough for huggingface_hub and datasets to read.

    with HubServer({"datasets/org/name": {"README.md": b"..."}}) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})

Models are kept under "org/name", data sets under "datasets/org/name", as a dict from path to bytes each. The
clients read HF_ENDPOINT when they are imported, so they belong in a subprocess.
"""

import hashlib
import json
import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATE = "2026-01-01T00:00:00.000Z"
REVISIONS = ("main", COMMIT)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range that a Range header asks for, or None where there is none."""
    if not header:
        return None
    first, last = header.removeprefix("bytes=").split("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


class HubServer:
    """Serves `repos`, a dict from repository to a dict from path to bytes, until its `with` block ends."""

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.repos = repos
        self.requests: list[tuple[str, str, str | None]] = []  # method, path with query, Range header
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, format, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a subprocess that is to see this server, and only it, as the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def downloads(self, method: str = "GET") -> set[str]:
        """The paths of the files that were asked for."""
        return {
            unquote(urlsplit(path).path).split("/resolve/")[1].partition("/")[2]
            for asked, path, _ in self.requests
            if asked == method and "/resolve/" in path
        }

    def answer(self, request: BaseHTTPRequestHandler):
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        url = urlsplit(request.path)
        path = unquote(url.path).strip("/")
        if path.startswith("api/"):
            self.answer_api(request, path.removeprefix("api/"), parse_qs(url.query), parse_qs(body.decode()))
        elif "/resolve/" in path:
            self.answer_file(request, *path.split("/resolve/", 1))
        else:
            self.send(request, 404, b"Not found")

    def answer_file(self, request: BaseHTTPRequestHandler, repo: str, path: str):
        revision, _, path = path.partition("/")
        if error := self.error(repo, revision):
            return self.send(request, 404, b"", **error)
        if path not in self.repos[repo]:
            return self.send(request, 404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data = self.repos[repo][path]
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        part = byte_range(request.headers.get("Range"), len(data))
        if part is None:
            return self.send(request, 200, data, **headers)
        begin, end = part
        if begin >= len(data):
            return self.send(request, 416, b"", Content_Range=f"bytes */{len(data)}")
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self.send(request, 206, data[begin:end], **headers)

    def answer_api(self, request: BaseHTTPRequestHandler, path: str, query: dict, form: dict):
        kind, _, rest = path.partition("/")
        org, name, action, revision, *inner = [*rest.split("/"), "", "", "", ""]
        repo = f"{org}/{name}" if kind == "models" else f"{kind}/{org}/{name}"
        if error := self.error(repo, revision or "main"):
            return self.send(request, 404, b"", **error)
        if action in ("", "revision"):
            siblings = [{"rfilename": p} for p in self.repos[repo]]
            info = {"id": f"{org}/{name}", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            return self.send_json(request, {**info, "lastModified": DATE, "createdAt": DATE})
        entries = self.tree(repo)
        if action == "paths-info":
            return self.send_json(request, [e for e in entries if e["path"] in form.get("paths", [])])
        folder = "/".join(inner).strip("/")
        prefix = f"{folder}/" if folder else ""
        below = [e for e in entries if e["path"].startswith(prefix)]
        if folder and not below:
            return self.send(request, 404, b"", X_Error_Code="EntryNotFound")
        if query.get("recursive", ["false"])[0].lower() != "true":
            below = [e for e in below if "/" not in e["path"][len(prefix) :]]
        self.send_json(request, below)

    def tree(self, repo: str) -> list[dict]:
        """Every folder and file of a repository, as the Hub describes them."""
        files = self.repos[repo]
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        entries = [{"type": "directory", "path": p, "oid": etag(p.encode()), "size": 0} for p in folders]
        entries += [{"type": "file", "path": p, "oid": etag(d), "size": len(d)} for p, d in files.items()]
        return sorted(entries, key=lambda entry: entry["path"])

    def error(self, repo: str, revision: str) -> dict[str, str] | None:
        if repo not in self.repos:
            return {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}
        return None if revision in REVISIONS else {"X_Error_Code": "RevisionNotFound"}

    def send_json(self, request: BaseHTTPRequestHandler, value):
        self.send(request, 200, json.dumps(value).encode(), Content_Type="application/json")

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, **headers: str):
        fields = Message()
        fields["Content-Length"] = str(len(data))
        for key, value in headers.items():
            fields[key.replace("_", "-")] = value
        request.send_response(status)
        for key, value in fields.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
