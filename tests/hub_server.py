"""A small stand-in for the Hugging Face Hub on 127.0.0.1, with good and bad networks, and clients of it.

    with HubServer({"datasets/org/name": {"README.md": b"..."}}) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})
        hub.fault("truncate", "train_000001", times=1)      # or a status, "html", "wrong", "stall", "drop"
        hub.fault("hold", "lfs/", method="PUT")             # sets hub.held; answered after hub.let_go()
        with hub.cut():                                     # no network meanwhile
            ...

Models are kept under "org/name", data sets under "datasets/org/name", as a dict from path to bytes each. The
clients read HF_ENDPOINT when they are imported, so they belong in a subprocess.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from lib import hub

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATE = "2026-01-01T00:00:00.000Z"
TOKEN = "hf_TheTestsOwnSecret"
LARGE = (".npy", ".bin", ".parquet", ".gz", ".zst", ".safetensors")
HTML = b"<!DOCTYPE html><html><body>Please log in to the network</body></html>"


def blob_id(data: bytes) -> str:
    """Returns git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str, data: bytes) -> bool:
    """Tells whether the Hub keeps the file in its large-file storage."""
    return path.endswith(LARGE) or len(data) > 1_000_000


def pointer(data: bytes) -> bytes:
    """Returns the pointer that git keeps of a large file."""
    oid = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()


def describe(path: str, data: bytes) -> dict:
    """Describes a file as the Hub lists it."""
    if not is_large(path, data):
        return {"type": "file", "path": path, "oid": blob_id(data), "size": len(data)}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(pointer(data))}
    return {"type": "file", "path": path, "oid": blob_id(pointer(data)), "size": len(data), "lfs": lfs}


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Returns the half-open range of a Range header, or None without one."""
    if not header:
        return None
    first, last = header.removeprefix("bytes=").split("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


class Fault(NamedTuple):
    kind: str | int
    where: str
    method: str


class HubServer:
    """Serves `repos`, a dict from repository to a dict from path to bytes, until its `with` block ends."""

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.repos = repos  # as they are on main
        self.commits = {repo: {COMMIT: files} for repo, files in repos.items()}  # the newest is the last
        self.uploads: dict[str, bytes] = {}  # large files by their SHA-256
        self.read_only: set[str] = set()  # repositories that TOKEN may not write to
        self.requests: list[tuple[str, str, str | None]] = []  # method, path with query, Range header
        self.heard: list[str] = []  # the clients' other headers, without the token's, and bodies
        self.faults: list[Fault] = []
        self.held, self.released = threading.Event(), threading.Event()
        self.sent = 0  # bytes of bodies
        self.bytes_a_second = 0.0  # for each connection; 0 for no limit
        self.is_down = False
        self.closing = threading.Event()
        self.address = ("127.0.0.1", 0)
        self.server = self.listen()
        self.address = self.server.server_address[:2]  # type: ignore[assignment]
        self.url = f"http://127.0.0.1:{self.address[1]}"

    def listen(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with contextlib.suppress(ConnectionError):
                    hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, format, *args):
                pass

        server = ThreadingHTTPServer(self.address, Handler)
        server.daemon_threads, server.block_on_close = True, False
        return server

    def __enter__(self) -> "HubServer":
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.close()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """The network is cut: open connections break, new ones are refused."""
        self.is_down = True
        self.close()
        try:
            yield
        finally:
            self.is_down = False
            self.server = self.listen()
            self.__enter__()

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """Returns variables for a subprocess that sees this server, and only it, as the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def fault(self, kind: str | int, where: str, times: int = 1, method: str = "GET"):
        """The next `times` requests of `method` for a path that matches the pattern `where` go wrong: an
        error status; "html" with status 200; "truncate" or "stall" after half of the body; "wrong" bytes;
        "drop": the connection breaks before the answer; "hold": the answer comes once the test lets it go."""
        self.faults += [Fault(kind, where, method)] * times

    def let_go(self):
        """Answers the held requests."""
        self.released.set()

    def next_fault(self, method: str, path: str) -> str | int:
        for fault in self.faults:
            if fault.method == method and re.search(fault.where, path):
                self.faults.remove(fault)
                return fault.kind
        return ""

    def downloads(self, method: str = "GET") -> set[str]:
        """Returns the paths of the requested files."""
        return {
            unquote(urlsplit(path).path).split("/resolve/")[1].partition("/")[2]
            for asked, path, _ in self.requests
            if asked == method and "/resolve/" in path
        }

    def forget(self, repo: str):
        """Removes a repository and all pending faults."""
        self.commits.pop(repo, None)
        self.repos.pop(repo, None)
        self.uploads.clear()
        self.faults.clear()

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Makes `files` the newest commit; a new repository gets its first. Older commits stay."""
        commits = self.commits.setdefault(repo, {})
        sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest() if commits else COMMIT
        self.repos[repo] = commits[sha] = files
        return sha

    # -- requests

    def answer(self, request: BaseHTTPRequestHandler):
        body = self.read_body(request)
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        headers = [
            f"{name}: {value}" for name, value in request.headers.items() if name.lower() != "authorization"
        ]
        self.heard.append("\n".join([request.path, *headers, body.decode(errors="replace")]))
        url = urlsplit(request.path)
        path = unquote(url.path).strip("/")
        fault = self.next_fault(request.command, path)
        if fault == "hold":
            self.held.set()
            self.released.wait(60)
        if self.is_down or fault == "drop":
            request.close_connection = True
            return None
        if isinstance(fault, int):
            return self.send(request, fault, b'{"error": "injected"}')
        if fault == "html":
            return self.send(request, 200, HTML, Content_Type="text/html")
        if path.startswith("api/"):
            return self.answer_api(request, path.removeprefix("api/"), parse_qs(url.query), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer_batch(request, json.loads(body))
        if path.startswith("lfs/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("lfs/"):
                return self.send(request, 400, b"not these bytes")
            self.uploads[path.removeprefix("lfs/")] = body
            return self.send(request, 200, b"")
        if "/resolve/" in path:
            repo, _, path = path.partition("/resolve/")
            return self.answer_file(request, repo, path, fault)
        return self.send(request, 404, b"Not found")

    def read_body(self, request: BaseHTTPRequestHandler) -> bytes:
        if request.headers.get("Transfer-Encoding", "") != "chunked":
            return request.rfile.read(int(request.headers.get("Content-Length", 0)))
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body

    def answer_file(self, request: BaseHTTPRequestHandler, repo: str, path: str, fault: str):
        revision, _, path = path.partition("/")
        if error := self.error(repo, revision):
            return self.send(request, 404, b"", **error)
        files, commit = self.files_at(repo, revision)
        if path not in files:
            return self.send(request, 404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = files[path]
        entry = describe(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if fault == "wrong":
            data = bytes(byte ^ 1 for byte in data)
        part = byte_range(request.headers.get("Range"), len(data))
        if part is None:
            return self.send(request, 200, data, fault, **headers)
        begin, end = part
        if begin >= len(data):
            return self.send(request, 416, b"", Content_Range=f"bytes */{len(data)}")
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return self.send(request, 206, data[begin:end], fault, **headers)

    def answer_api(self, request: BaseHTTPRequestHandler, path: str, query: dict, body: bytes):
        kind, _, rest = path.partition("/")
        if kind == "whoami-v2":
            if not self.is_logged_in(request):
                return self.send(request, 401, b'{"error": "Invalid username or password."}')
            return self.send_json(request, {"type": "user", "name": "tester", "orgs": []})
        if path == "validate-yaml":  # the head of a README.md
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.send_json(request, {"errors": [], "warnings": []})
        if path == "repos/create":
            return self.answer_create(request, json.loads(body))
        org, name, action, revision, *inner = [*rest.split("/"), "", "", "", ""]
        repo = f"{org}/{name}" if kind == "models" else f"{kind}/{org}/{name}"
        if action == "auth-check":
            refused = repo not in self.repos or not self.may_write(request, repo)
            return self.send(request, 403 if refused else 200, b"{}")
        if error := self.error(repo, revision or "main"):
            return self.send(request, 404, b"", **error)
        if action in ("preupload", "commit"):
            if not self.may_write(request, repo):
                return self.send(request, 403, b'{"error": "You have no write access"}')
            if action == "preupload":
                return self.answer_preupload(request, repo, body)
            return self.answer_commit(request, repo, body)
        files, commit = self.files_at(repo, revision or "main")
        if action in ("", "revision"):
            siblings = [{"rfilename": p} for p in files]
            info = {"id": f"{org}/{name}", "sha": commit, "siblings": siblings, "tags": [], "private": False}
            return self.send_json(request, {**info, "lastModified": DATE, "createdAt": DATE})
        entries = self.tree(files)
        if action == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            return self.send_json(request, [e for e in entries if e["path"] in wanted])
        folder = "/".join(inner).strip("/")
        prefix = f"{folder}/" if folder else ""
        below = [e for e in entries if e["path"].startswith(prefix)]
        if folder and not below:
            return self.send(request, 404, b"", X_Error_Code="EntryNotFound")
        if query.get("recursive", ["false"])[0].lower() != "true":
            below = [e for e in below if "/" not in e["path"][len(prefix) :]]
        return self.send_json(request, below)

    # -- uploads

    def is_logged_in(self, request: BaseHTTPRequestHandler) -> bool:
        return request.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self, request: BaseHTTPRequestHandler, repo: str) -> bool:
        return self.is_logged_in(request) and repo not in self.read_only

    def answer_create(self, request: BaseHTTPRequestHandler, wanted: dict):
        kind = f"{wanted['type']}s/" if wanted.get("type", "model") != "model" else ""
        repo = f"{kind}{wanted['organization']}/{wanted['name']}"
        if not self.may_write(request, repo):
            return self.send(request, 403, b'{"error": "You do not have the rights to create a repo"}')
        is_new = repo not in self.repos
        if is_new:
            self.commit(repo, {})
        return self.send_json(request, {"url": f"{self.url}/{repo}"}, 200 if is_new else 409)

    def answer_preupload(self, request: BaseHTTPRequestHandler, repo: str, body: bytes):
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 1_000_000
            facts = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in self.repos[repo]:
                entry = describe(file["path"], self.repos[repo][file["path"]])
                facts["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            files.append({"path": file["path"], **facts})
        self.send_json(request, {"files": files})

    def answer_batch(self, request: BaseHTTPRequestHandler, wanted: dict):
        objects = []
        for item in wanted["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.uploads else {"actions": upload})})
        self.send_json(request, {"transfer": "basic", "objects": objects})

    def answer_commit(self, request: BaseHTTPRequestHandler, repo: str, body: bytes):
        files = dict(self.repos[repo])
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.uploads[item["value"]["oid"]]
        sha = self.commit(repo, files)
        url = f"{self.url}/{repo}/commit/{sha}"
        self.send_json(request, {"success": True, "commitOid": sha, "commitUrl": url})

    # -- answers

    def tree(self, files: dict[str, bytes]) -> list[dict]:
        """Lists every folder and file of a repository as the Hub does."""
        folders = {str(parent) for path in files for parent in Path(path).parents} - {".", "/"}
        entries = [{"type": "directory", "path": p, "oid": blob_id(p.encode()), "size": 0} for p in folders]
        entries += [describe(path, data) for path, data in files.items()]
        return sorted(entries, key=lambda entry: entry["path"])

    def files_at(self, repo: str, revision: str) -> tuple[dict[str, bytes], str]:
        commit = list(self.commits[repo])[-1] if revision == "main" else revision
        return self.commits[repo][commit], commit

    def error(self, repo: str, revision: str) -> dict[str, str] | None:
        if repo not in self.repos:
            return {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}
        known = revision == "main" or revision in self.commits[repo]
        return None if known else {"X_Error_Code": "RevisionNotFound"}

    def send_json(self, request: BaseHTTPRequestHandler, value, status: int = 200):
        self.send(request, status, json.dumps(value).encode(), Content_Type="application/json")

    def send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, fault: str = "", **headers: str
    ):
        fields = Message()
        fields["Content-Length"] = str(len(data))
        for key, value in headers.items():
            fields[key.replace("_", "-")] = value
        request.send_response(status)
        for key, value in fields.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        breaks = len(data) // 2 if fault in ("truncate", "stall") else None
        block = max(1, int(self.bytes_a_second / 20)) if self.bytes_a_second else 1 << 16
        for begin in range(0, len(data[:breaks]), block):
            if self.is_down:
                break
            piece = data[:breaks][begin : begin + block]
            request.wfile.write(piece)
            self.sent += len(piece)
            if self.bytes_a_second:
                self.closing.wait(0.05)
        if fault == "stall":
            self.closing.wait(60)
        if fault or self.is_down:
            request.close_connection = True


# -----------------------------------------------------------------------------
# its clients

WORKER = """
import contextlib, io, json, os, sys, time, traceback
from pathlib import Path
answers, sys.stdout = sys.stdout, sys.stderr
import fineweb
from lib import files, hub, hub_shards, shards, shard_writer
hub_shards.HUB_CACHE = Path(os.environ["HF_HOME"]) / "shards"
slept = []
really_sleep, time.sleep = time.sleep, slept.append
def bytes_of(paths):
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed or renamed just now
            total += path.stat().st_size
    return total
print("ready", file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    slept.clear()
    names = dict(globals(), result=None, **asked["names"])
    answer, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(asked["code"], names)
            answer["result"] = names["result"]
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer.update(error=kinds, message=str(error), trace=traceback.format_exc())
    print(json.dumps(dict(answer, printed=printed.getvalue(), slept=slept)), file=answers, flush=True)
"""


class Client:
    """A process that sees `server` as the Hugging Face Hub and runs code for the tests; it never sleeps."""

    def __init__(self, server: HubServer, home: Path, token: str = "", **environment: str):
        env = {**os.environ, **server.environment(home, token), **environment, "OMP_NUM_THREADS": "1"}
        env |= {"DOWNLOAD_PATIENCE": "20", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=env, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.stderr = ""
        threading.Thread(target=self.drain, daemon=True).start()
        assert self.process.stdout and self.process.stdout.readline() == "ready\n", self.stderr

    def drain(self):
        for line in self.process.stderr or []:
            self.stderr += line

    def send(self, code: str, **names: Any):
        """Sends code to run, and does not wait for the answer."""
        print(json.dumps({"code": code, "names": names}, default=str), file=self.process.stdin, flush=True)

    def ask(self, code: str, **names: Any) -> dict:
        """Runs the code and returns its output and its `result` or error."""
        self.send(code, **names)
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def __call__(self, code: str, **names: Any) -> Any:
        """Runs the code and returns its `result`."""
        answer = self.ask(code, **names)
        assert "error" not in answer, answer["trace"] + answer["printed"]
        return answer["result"]

    def refusal(self, code: str, kind: str = "OSError", **names: Any) -> dict:
        """Runs code that must raise an error of that kind, and returns the answer."""
        answer = self.ask(code, **names)
        assert kind in answer.get("error", []), answer
        return answer

    def close(self):
        self.process.kill()
        self.process.communicate()


# -----------------------------------------------------------------------------
# a script that sees the server


def see_hub(environment: dict[str, str], patience: float):
    """A patch for helpers.Training: sets the shell's variables. Pauses take a fiftieth of their time
    (huggingface_hub's own are up to 23 s before an error)."""
    os.environ.update(environment)
    hub.PATIENCE = patience
    time.sleep = partial(sleep_less, time.sleep)


def sleep_less(sleep: Callable[[float], None], seconds: float):
    sleep(seconds / 50)


def list_files(folder: Path) -> set[str]:
    """Lists the files below the folder that could be taken for data."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if ".incoming" not in path.parts}
