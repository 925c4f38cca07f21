"""lib/files.py: atomic writes, downloads over bad networks, and items made ahead in a thread."""

import gzip
import hashlib
import itertools
import json
import math
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from corpora import wait_until

from lib import files

# -----------------------------------------------------------------------------
# atomic writes


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(f):
        f.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


# -----------------------------------------------------------------------------
# downloads

BODY = b"kettle" + b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(12_000))
DIGEST = hashlib.sha256(BODY).hexdigest()
ALTERED = BODY.replace(b"kettle", b"teapot")


@dataclass
class Server:
    """A web server with one file. `plan` has the kind of answer to each request; the last one repeats."""

    plan: list[str]
    url: str = ""
    ranges: list[str | None] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: BaseHTTPRequestHandler):
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        kind = self.plan[min(len(self.ranges), len(self.plan)) - 1]
        status, body, headers = 200, BODY, {}
        if kind == "404":
            status, body = 404, b"not found"
        elif kind == "html":
            body, headers = b"<html>too many requests</html>", {"Content-Type": "text/html"}
        elif kind == "altered":
            body = ALTERED
        elif "gzip" in request.headers.get("Accept-Encoding", ""):  # as GitHub does
            body, headers = gzip.compress(body, mtime=0), {"Content-Encoding": "gzip"}
        if asked and status == 200 and kind != "no ranges":
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            status, headers["Content-Range"] = 206, f"bytes {begin}-{len(body) - 1}/{len(body)}"
            body = body[begin:]
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if kind in ("cut", "stall") else body)
        request.wfile.flush()
        if kind == "stall":
            self.end.wait()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses between tries, which are not waited for."""
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def serve(monkeypatch, pauses):
    """Starts a server with a plan. The client gives up a stalled one soon."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    get = requests.get

    def impatient_get(url, *, timeout, **options):
        assert 1 <= timeout <= 60
        return get(url, timeout=0.3, **options)

    monkeypatch.setattr(requests, "get", impatient_get)
    running: list[tuple[Server, ThreadingHTTPServer]] = []

    def start(*plan: str) -> Server:
        server = Server(list(plan))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.url = f"http://127.0.0.1:{http.server_port}/hellaswag_val.jsonl"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append((server, http))
        return server

    yield start
    for server, http in running:
        server.end.set()
        http.shutdown()
        http.server_close()


def test_a_download_is_checked_and_made_once(serve, tmp_path):
    server, path = serve("whole"), tmp_path / "data" / "items.jsonl"
    for _ in range(2):
        assert files.download(server.url, path, DIGEST) == path
    assert path.read_bytes() == BODY
    assert server.ranges == [None]
    assert [p.name for p in path.parent.iterdir()] == ["items.jsonl"]


def test_another_file_at_a_downloads_place_is_refused_and_left(tmp_path):
    (tmp_path / "file").write_text("four lines of my own", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"file is not the file of http://nowhere: its SHA-256 is \w+, not 00"
    ):
        files.download("http://nowhere", tmp_path / "file", "00")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "four lines of my own"


def test_json_has_null_for_what_is_not_finite(tmp_path):
    value = {"a": [math.inf, -math.inf, math.nan, 1.5], "b": {"c": math.nan}, "d": "NaN"}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        **{"a": [None, None, None, 1.5], "b": {"c": None}, "d": "NaN"}
    }


@pytest.mark.parametrize(
    "plan",
    [
        ("cut", "whole"), ("stall", "whole"),  # resumed
        ("cut", "no ranges"), ("404", "whole"), ("html", "whole"), ("altered", "whole"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.fault(20)
def test_a_download_recovers_from_one_bad_answer(serve, pauses, tmp_path, plan):
    server, path = serve(*plan), tmp_path / "items.jsonl"
    files.download(server.url, path, DIGEST)
    assert path.read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["items.jsonl"]
    assert any(pauses)
    first, second = server.ranges
    assert first is None
    if plan[0] in ("cut", "stall"):
        assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= len(BODY) // 2


def test_a_name_without_an_address_is_not_tried_again(pauses, tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.invalid/x was not read: .* no address"):
        files.download("http://nowhere.invalid/x", tmp_path / "x", DIGEST)
    assert not any(pauses)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("404", "404"),
        ("html", "30 bytes"),
        ("altered", hashlib.sha256(ALTERED).hexdigest()),
        ("stall", "timed out"),
        ("no server", "refused"),
    ],
    ids=["404", "html", "altered", "stall", "no server"],
)
@pytest.mark.fault(20)
def test_a_download_that_fails_gives_url_and_reason_and_leaves_nothing(
    serve, pauses, tmp_path, trouble, reason
):
    url = serve(trouble).url if trouble != "no server" else "http://127.0.0.1:9/nothing"
    with pytest.raises(OSError) as error:
        files.download(url, tmp_path / "items.jsonl", DIGEST, tries=3)
    for part in (url, reason, "3 tries"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())
    waited = [pause for pause in pauses if pause]
    assert waited == sorted(set(waited)) and len(waited) == 2  # back-off


# -----------------------------------------------------------------------------
# prefetching


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_items_come_in_order_and_at_most_so_many_ahead(depth, count):
    made: list[int] = []
    used = 0
    for item in files.prefetch((made.append(n) or n for n in range(count)), depth):
        assert item == used
        assert len(made) <= used + 2 + depth  # this one, those in the queue, and one that waits for a place
        used += 1
    assert used == count


def test_items_are_made_while_the_first_is_used():
    made: list[int] = []
    items = files.prefetch((made.append(n) or n for n in range(100)), depth=3)
    assert next(items) == 0
    wait_until(lambda: len(made) >= 4)
    time.sleep(0.05)
    assert len(made) <= 5
    del items


@pytest.mark.parametrize(
    "error", [ValueError("bad"), StopIteration("early"), KeyboardInterrupt("stop"), OSError(5)]
)
@pytest.mark.parametrize("before", [0, 3])
def test_an_error_of_the_thread_is_raised_where_the_items_are_used(error, before):
    class Failing:
        def __init__(self):
            self.left = before

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise error
            self.left -= 1
            return self.left

    seen = []
    if isinstance(error, StopIteration):
        seen += files.prefetch(Failing(), depth=2)
    else:
        with pytest.raises(type(error)) as caught:
            for item in files.prefetch(Failing(), depth=2):
                seen.append(item)
        assert caught.value is error
    assert seen == list(range(before))[::-1]


@pytest.mark.parametrize("taken", [1, 10])
def test_the_thread_stops_when_its_consumer_does(taken):
    closed: list[bool] = []

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    before = set(threading.enumerate())
    items = files.prefetch(files.prefetch(endless(), depth=1), depth=3)
    assert list(itertools.islice(items, taken)) == list(range(taken))
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    del items
    wait_until(lambda: not any(thread.is_alive() for thread in threads))
    wait_until(lambda: bool(closed))
