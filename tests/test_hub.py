"""hub.py and what is built on it: text and shards from the Hugging Face Hub, shards to it, and training
straight from it, with good and bad networks."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT
from hub_server import COMMIT, TOKEN, HubServer

import fineweb
from lib import hub, shard_writer, shards, tokenizer

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
        """Has the code run."""
        print(json.dumps({"code": code, "names": names}, default=str), file=self.process.stdin, flush=True)

    def ask(self, code: str, **names: Any) -> dict:
        """Runs the code; what it prints, and its `result` or its error, come back."""
        self.send(code, **names)
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def __call__(self, code: str, **names: Any) -> Any:
        """The code's `result`."""
        answer = self.ask(code, **names)
        assert "error" not in answer, answer["trace"] + answer["printed"]
        return answer["result"]

    def refusal(self, code: str, kind: str = "OSError", **names: Any) -> dict:
        """What is said when the code is refused with an error of that kind."""
        answer = self.ask(code, **names)
        assert kind in answer.get("error", []), answer
        return answer

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer({}) as server:
        yield server


@pytest.fixture(scope="module")
def shared_client(server, tmp_path_factory) -> Iterator[Client]:
    client = Client(server, tmp_path_factory.mktemp("home"), TOKEN)
    yield client
    client.close()
    assert TOKEN not in client.stderr


@pytest.fixture
def client(shared_client, server) -> Iterator[Client]:
    server.faults.clear()
    server.requests.clear()
    yield shared_client
    server.faults.clear()


@pytest.fixture
def repo(server, request) -> str:
    """A name of the test's own: the clients remember what they know of a repository."""
    return f"org/{abs(hash(request.node.nodeid)):x}"


def cli(server: HubServer, home: Path, *arguments: str | Path, token: str = "") -> subprocess.Popen:
    """fineweb.py as a user starts it."""
    env = {
        **os.environ,
        **server.environment(home, token),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "fineweb.py"), *map(str, arguments)],
        env={**env, "DOWNLOAD_PATIENCE": "10"}, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def files_under(folder: Path) -> set[str]:
    """All that anyone could take for data."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if ".incoming" not in path.parts}


# -----------------------------------------------------------------------------
# one file

RANDOM = np.random.default_rng(0)
BIG = RANDOM.bytes(24_000_000)  # huggingface_hub keeps what arrived in units of 10 MB
FILES = {"data/some.npy": RANDOM.bytes(200_000), "data/some.txt": RANDOM.bytes(20_000), "empty.txt": b""}
FETCH = """
commit, files = hub.list_hub(repo)
result = str(hub.fetch(files[path], Path(folder)))
"""


def test_the_list_says_what_each_file_must_hash_to(client, server, repo):
    server.commit(f"datasets/{repo}", FILES)
    code = "commit, files = hub.list_hub(repo, None, paths)\nresult = commit, list(map(vars, files.values()))"
    commit, everything = client(code, repo=repo, paths=None)
    assert commit == COMMIT
    assert {file["path"]: file["size"] for file in everything} == {p: len(d) for p, d in FILES.items()}
    assert {file["path"] for file in everything if file["sha256"]} == {"data/some.npy"}
    _, two = client(code, repo=repo, paths=["data/some.npy", "empty.txt"])
    assert two == [file for file in everything if file["path"] != "data/some.txt"]


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_fetched_once(client, server, repo, tmp_path, path):
    server.commit(f"datasets/{repo}", FILES)
    for _ in range(2):
        assert client(FETCH, repo=repo, path=path, folder=tmp_path) == str(tmp_path / path)
        assert (tmp_path / path).read_bytes() == FILES[path]
    assert sum(method == "HEAD" for method, *_ in server.requests) == 1
    assert files_under(tmp_path) == {path}
    assert {p.suffix for p in tmp_path.glob(".incoming/**/*") if p.is_file()} <= {
        ".lock",
        ".metadata",
        ".TAG",
        "",
    }


FAULTS = {
    404: "404",
    401: "401",
    403: "403",
    429: "429",
    500: "500",
    "html": "",
    "wrong": "bytes arrived",
    "truncate": "",
}


@pytest.mark.parametrize("path", ["data/some.npy", "data/some.txt"])
@pytest.mark.parametrize(
    ("method", "kind"),
    [*(("GET", kind) for kind in FAULTS), *(("HEAD", n) for n in (404, 401, 403, 500, "html"))],
)
@pytest.mark.fault(20)
def test_a_file_that_cannot_be_had_is_refused_with_its_url(
    client, server, repo, tmp_path, path, kind, method
):
    server.commit(f"datasets/{repo}", FILES)
    server.fault(kind, path, times=1000, method=method)
    answer = client.refusal(FETCH, repo=repo, path=path, folder=tmp_path)
    assert f"hf://datasets/{repo}@{COMMIT}/{path}" in answer["message"]
    assert FAULTS[kind] in answer["message"]
    assert files_under(tmp_path) == set()
    assert TOKEN not in json.dumps(answer)
    tried_again = "trying again" in answer["printed"]
    assert tried_again == (kind not in (401, 403, 404))  # which no patience will mend


@pytest.mark.parametrize("kind", [500, 429, "html", "wrong", "truncate", "stall"])
@pytest.mark.fault(20)
def test_a_fault_that_passes_is_outlived(client, server, repo, tmp_path, kind):
    server.commit(f"datasets/{repo}", {"big.npy": BIG})
    server.fault(kind, "big.npy")
    client(FETCH, repo=repo, path="big.npy", folder=tmp_path)
    assert (tmp_path / "big.npy").read_bytes() == BIG
    ranges = [part for method, path, part in server.requests if method == "GET" and "/resolve/" in path]
    continued = ["bytes=10485760-"] if kind in ("truncate", "stall") else [None]
    assert ranges == [None, *continued]


@pytest.mark.parametrize("where", ["^api/datasets/org/[0-9a-f]+$", "/tree/"])
@pytest.mark.parametrize("kind", [500, "html"])
@pytest.mark.fault(20)
def test_the_list_outlives_a_bad_answer(client, server, repo, where, kind):
    server.commit(f"datasets/{repo}", FILES)
    server.fault(kind, where)
    answer = client.ask("result = len(hub.list_hub(repo)[1])", repo=repo)
    assert answer.get("result") == len(FILES), answer
    assert answer["slept"]


@pytest.mark.parametrize("location", ["org/nothing", "org/there@no-branch"])
def test_what_the_hub_does_not_have_is_refused_at_once(client, server, location):
    server.commit("datasets/org/there", FILES)
    answer = client.refusal("hub.list_hub(*hub.parse_hub(location))", location=location)
    assert f"hf://datasets/{location.partition('@')[0]}" in answer["message"]
    assert "NotFound" in answer["message"]
    assert answer["slept"] == []


@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("hf://datasets/org/name", ("org/name", None)),
        ("hf://datasets/org/name/", ("org/name", None)),
        ("org/na.m-e_2@v1.0", ("org/na.m-e_2", "v1.0")),
        ("hf://datasets/org/name@refs/pr/1", ("org/name", "refs/pr/1")),
    ],
)
def test_locations_are_read(location, found):
    assert hub.parse_hub(location) == found


@pytest.mark.parametrize(
    "location", ["name", "hf://datasets/org", "org/name/file", "org/name@", "org/na me", ""]
)
def test_what_is_no_location_is_refused(location):
    with pytest.raises(ValueError, match="does not name a dataset"):
        hub.parse_hub(location)


@pytest.mark.parametrize(
    "path", ["../outside.npy", "/{outside}.npy", "a/../../outside.npy", "..\\outside.npy"]
)
@pytest.mark.parametrize("paths", [None, ["{path}"]])
def test_a_list_that_leads_out_of_the_folder_is_refused(client, server, repo, tmp_path, path, paths):
    path = path.replace("{outside}", str(tmp_path / "outside").strip("/"))
    server.commit(f"datasets/{repo}", {path: b"evil", "good.npy": b"good"})
    names = dict(repo=repo, paths=[path] if paths else None)
    answer = client.refusal("hub.list_hub(repo, None, paths)", **names)
    assert "leads out of its folder" in answer["message"]
    code = "hub.fetch(hub.HubFile(repo, commit, path, 4, '', ''), Path(folder))"
    client.refusal(code, "Exception", repo=repo, commit=COMMIT, path=path, folder=tmp_path / "in" / "side")
    assert not list(tmp_path.rglob("outside*"))


def test_two_processes_share_one_download(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", FILES)
    other = Client(server, tmp_path / "home")
    server.bytes_a_second = 400_000
    try:
        names = dict(repo=repo, path="data/some.npy", folder=tmp_path / "folder")
        thread = threading.Thread(target=client, args=(FETCH,), kwargs=names)
        thread.start()
        wait_until(lambda: server.downloads() == {"data/some.npy"})
        other(FETCH, **names)
        assert (tmp_path / "folder/data/some.npy").read_bytes() == FILES["data/some.npy"]
        thread.join()
    finally:
        server.bytes_a_second = 0
        other.close()
    assert sum(method == "GET" and "/resolve/" in path for method, path, _ in server.requests) == 1


def test_what_a_killed_process_left_is_removed(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", FILES)
    victim = Client(server, tmp_path / "home")
    server.bytes_a_second = 100_000
    names = dict(repo=repo, path="data/some.npy", folder=tmp_path / "folder")
    try:
        victim.send(FETCH, **names)
        wait_until(lambda: bool(list(tmp_path.rglob("*.incomplete"))))
    finally:
        victim.close()
        server.bytes_a_second = 0
    assert list(tmp_path.rglob("*.incomplete"))
    assert files_under(tmp_path / "folder") == set()
    client(FETCH, **names)
    assert (tmp_path / "folder/data/some.npy").read_bytes() == FILES["data/some.npy"]
    assert not list(tmp_path.rglob("*.incomplete"))


def test_patience_has_an_end_and_the_pauses_grow(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def attempt():
        raise ConnectionError("the line is dead")

    with pytest.raises(OSError, match=r"^it could not be had .*the line is dead"):
        hub.retry("more than it", lambda: hub.retry("it", attempt))
    assert sum(slept) <= hub.PATIENCE
    assert sum(slept) > 0.9 * hub.PATIENCE
    assert slept[:6] == [1, 2, 4, 8, 16, 30]
    assert capsys.readouterr().err.count("it: ConnectionError: the line is dead; trying again") == len(slept)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "no"), ValueError()]
)
def test_no_patience_helps_a_full_disk(monkeypatch, error):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))

    def attempt():
        raise error

    with pytest.raises(OSError, match="could not be had"):
        hub.retry("outer", lambda: hub.retry("inner", attempt))


def test_the_start_of_a_file_is_read_alone(client, server, repo):
    server.commit(f"datasets/{repo}", {"big.npy": BIG})
    before = server.sent
    code = "result = list(hub.read_start(hub.list_hub(repo)[1]['big.npy'], 1000))"
    assert bytes(client(code, repo=repo)) == BIG[:1000]
    assert [part for method, path, part in server.requests if "/resolve/" in path] == ["bytes=0-999"]
    assert server.sent - before < 5000


# -----------------------------------------------------------------------------
# text from the Hub

DOCUMENTS = [f"Document {i}, {'with some words, ' * (i % 7)}naïve 日本語 and an end." for i in range(90)]
PREPARE = "result = str(fineweb.prepare(fineweb.Config(**cfg)))"


def jsonl(texts, key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(texts, key: str = "text") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), key: texts}), buffer, row_group_size=20)
    return buffer.getvalue()


def csv(texts) -> bytes:
    return ("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts))).encode()


def tokens_of(folder: Path, *splits: str) -> np.ndarray:
    """The verified shards of some splits, one after the other."""
    found = [s["file"] for s in shards.verify(folder)["shards"] if s["split"] in splits]
    return np.concatenate([np.load(folder / file) for file in found])


def decoded(folder: Path, *splits: str) -> list[str]:
    """The documents of some splits."""
    ids = tokens_of(folder, *(splits or ("val", "train")))
    assert ids[0] == tokenizer.END_OF_TEXT
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == ids[0]))[1:]]


LAYOUTS = {
    "parquet": {"data/train-00000-of-00002.parquet": parquet(DOCUMENTS[:40]),
                "data/train-00001-of-00002.parquet": parquet(DOCUMENTS[40:])},
    "jsonl": {"train-0.jsonl": jsonl(DOCUMENTS[:40]), "train-1.jsonl": jsonl(DOCUMENTS[40:])},
    "json": {"train.json": jsonl(DOCUMENTS)},
    "jsonl.gz": {"train.jsonl.gz": gzip.compress(jsonl(DOCUMENTS))},
    "csv": {"train.csv": csv(DOCUMENTS)},
    "with a card": {
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: texts/*.parquet\n---\n",
        "texts/b.parquet": parquet(DOCUMENTS[40:]), "texts/a.parquet": parquet(DOCUMENTS[:40]),
        "other/c.parquet": parquet(["no"]),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_of_any_format_becomes_shards(client, server, repo, tmp_path, layout):
    server.commit(f"datasets/{repo}", LAYOUTS[layout])
    cfg = dict(source=f"hf:{repo}", name="it", out_dir=str(tmp_path / "out"), shard_tokens=700)
    client(PREPARE, cfg=cfg)
    assert decoded(tmp_path / "out") == DOCUMENTS
    manifest = shards.verify(tmp_path / "out")
    assert manifest["source"] == f"hf:{repo}"
    assert manifest["revision"] == COMMIT
    assert len(manifest["shards"]) > 3
    assert sum(shard["documents"] for shard in manifest["shards"]) == len(DOCUMENTS)
    assert all(COMMIT in path for method, path, _ in server.requests if "/resolve/" in path)


CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}, {split: test, path: sample/test.jsonl}]
---
# A stand-in for FineWeb-Edu
"""
FINEWEB_EDU = {
    "README.md": CARD,
    "data/CC-MAIN-2013-20/000_00000.parquet": parquet(["not in the sample, but in the whole"] * 20),
    "sample/10BT/000_00000.parquet": parquet(DOCUMENTS[:50]),
    "sample/10BT/001_00000.parquet": parquet(DOCUMENTS[50:]),
    "sample/test.jsonl": jsonl(DOCUMENTS[10:30], "body"),
}


def test_by_default_the_fineweb_edu_sample_is_fetched_from_the_hub(server, tmp_path):
    server.requests.clear()
    server.repos.pop("datasets/HuggingFaceFW/fineweb-edu", None)
    server.commit("datasets/HuggingFaceFW/fineweb-edu", FINEWEB_EDU)
    flags = ["--out-dir", tmp_path / "out", "--shard-tokens", "1000"]
    out, _ = finished(cli(server, tmp_path / "home", *flags))
    assert decoded(tmp_path / "out") == DOCUMENTS
    manifest = shards.verify(tmp_path / "out")
    assert manifest["source"] == "hf:HuggingFaceFW/fineweb-edu"
    assert manifest["config"] == "sample-10BT"
    assert manifest["revision"] == COMMIT
    assert {shard["file"].rpartition("_")[0] for shard in manifest["shards"]} == {
        "fineweb-edu-10BT_val",
        "fineweb-edu-10BT_train",
    }
    wanted = {path for path in FINEWEB_EDU if path.startswith(("README", "sample/10BT"))}
    assert server.downloads("GET") == wanted  # and nothing of the rest of the data set
    assert not list((tmp_path / "home").rglob("*.parquet"))
    kept = files_under(tmp_path / "out" / "downloads")
    assert kept == {f"{COMMIT[:12]}/{path}" for path in wanted if path != "README.md"}
    assert "downloads" in out
    assert "--clear-cache" in out
    server.requests.clear()
    out, _ = finished(cli(server, tmp_path / "home", *flags))
    assert "already complete" in out
    assert not server.requests


def test_configuration_and_split_can_be_chosen(client, server, tmp_path):
    server.commit("datasets/HuggingFaceFW/copy", FINEWEB_EDU)
    cfg = dict(source="hf:HuggingFaceFW/copy", val_tokens=10, text_field="body")
    client(PREPARE, cfg=dict(cfg, config="sample-10BT", split="test", out_dir=str(tmp_path / "a")))
    assert decoded(tmp_path / "a") == DOCUMENTS[10:30]
    cfg = dict(source="hf://datasets/HuggingFaceFW/copy", out_dir=str(tmp_path / "b"))
    answer = client.refusal(PREPARE, "Exception", cfg=cfg)  # that is a data set of shards
    assert "holds no shards" in answer["message"]
    cfg = dict(source=f"hf:HuggingFaceFW/copy@{COMMIT}", config="default", out_dir=str(tmp_path / "c"))
    client(PREPARE, cfg=cfg)
    assert set(decoded(tmp_path / "c")) == {"not in the sample, but in the whole"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source="hf:nobody/nothing"), "nobody/nothing"),
        (dict(source="hf:nobody"), "does not name a dataset"),
        (dict(split="validation"), "no split 'validation'.*train.*--split"),
        (dict(config="none"), "'none'.*sample-10BT"),
        (dict(text_field="body"), "no column 'body'.*--text-field"),
        (dict(source="hf:org/without-data"), "org/without-data"),
        (dict(source="hf:org/with-code"), "org/with-code"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused_at_once(client, server, tmp_path, change, message):
    server.commit("datasets/org/edu", FINEWEB_EDU)
    server.commit("datasets/org/without-data", {"README.md": b"nothing"})
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')"
    server.commit("datasets/org/with-code", {"with-code.py": code.encode(), "README.md": b""})
    cfg = {"source": "hf:org/edu", "config": "sample-10BT", "out_dir": str(tmp_path / "out"), **change}
    if "with" in cfg["source"]:
        cfg["config"] = ""
    answer = client.refusal(PREPARE, "Exception", cfg=cfg)
    assert set(answer["error"]) & {"OSError", "ValueError"}, answer
    assert re.search(message, answer["message"]), answer
    assert answer["slept"] == []
    assert not list(tmp_path.rglob("*.npy"))
    assert not canary.exists()


ARTICLES = [
    f" \n = Title {i} = \n \n Some text about {i} . \n \n = = Section = = \n \n More . \n" for i in range(9)
]
OTHERS = "".join(
    f"- config_name: {name}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("test", "train", "validation")
    )
    for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1")
)  # fmt: skip
MIDDLE = ARTICLES[4][:40], ARTICLES[4][40:]


def lines(*articles: str) -> bytes:
    """As the Hub has WikiText: a row a line, an empty one for " "."""
    rows = "".join(articles).splitlines(keepends=True)
    return parquet(["" if row == " \n" else row for row in rows])


WIKITEXT = {
    "README.md": f"---\nconfigs:\n{OTHERS}---\n".encode(),
    "wikitext-103-raw-v1/test-00000-of-00001.parquet": lines(*ARTICLES[:2]),
    "wikitext-103-raw-v1/train-00000-of-00002.parquet": lines(ARTICLES[2], ARTICLES[3], MIDDLE[0]),
    "wikitext-103-raw-v1/train-00001-of-00002.parquet": lines(MIDDLE[1], ARTICLES[5], ARTICLES[6]),
    "wikitext-103-raw-v1/validation-00000-of-00001.parquet": lines(*ARTICLES[7:]),
    "wikitext-2-raw-v1/train-00000-of-00001.parquet": lines(" = no = \n"),
    "wikitext-2-raw-v1/test-00000-of-00001.parquet": lines(" = no = \n"),
    "wikitext-2-raw-v1/validation-00000-of-00001.parquet": lines(" = no = \n"),
}


def test_wikitext_keeps_its_splits_and_its_articles(client, server, tmp_path):
    server.commit("datasets/Salesforce/wikitext", WIKITEXT)
    cfg = dict(source="wikitext-103", out_dir=str(tmp_path), shard_tokens=60)
    client(PREPARE, cfg=cfg)
    assert decoded(tmp_path, "test") == ARTICLES[:2]
    assert decoded(tmp_path, "train") == ARTICLES[2:7]
    assert decoded(tmp_path, "val") == ARTICLES[7:]
    assert {path.split("/")[0] for path in server.downloads()} == {"README.md", "wikitext-103-raw-v1"}
    cfg = dict(source="wikitext-103", out_dir=str(tmp_path / "other"), val_tokens=50)
    assert "its own validation" in client.refusal(PREPARE, "ValueError", cfg=cfg)["message"]


def test_tinystories_keeps_its_validation_split(client, server, tmp_path):
    files = {
        "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
        "TinyStories-train.txt": b"no",
        "TinyStories-valid.txt": b"no",
        "data/train-00000-of-00002-2d5a1467fff1081b.parquet": parquet(DOCUMENTS[:30]),
        "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": parquet(DOCUMENTS[30:70]),
        "data/validation-00000-of-00001-869c898b519ad725.parquet": parquet(DOCUMENTS[70:]),
    }
    server.commit("datasets/roneneldan/TinyStories", files)
    client(PREPARE, cfg=dict(source="tinystories", out_dir=str(tmp_path), shard_tokens=500))
    assert decoded(tmp_path, "train") == DOCUMENTS[:70]
    assert decoded(tmp_path, "val") == DOCUMENTS[70:]


@pytest.mark.slow
@pytest.mark.fault(17)
def test_a_killed_run_goes_on_at_the_revision_it_began_with(server, repo, tmp_path):
    server.commit(f"datasets/{repo}", LAYOUTS["parquet"])
    flags = ["--source", f"hf:{repo}", "--name", "it", "--shard-tokens", "300", "--val-tokens", "100"]
    finished(cli(server, tmp_path / "home", *flags, "--out-dir", tmp_path / "whole"))
    server.fault("stall", "train-00001")
    process = cli(server, tmp_path / "home", *flags, "--out-dir", tmp_path / "killed")
    wait_until(lambda: len(list((tmp_path / "killed").glob("parts/*/*.npy"))) > 2, process)
    process.kill()
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("train-00000*.parquet")}
    assert len(kept) == 1
    server.requests.clear()
    moved = {"data/train-00000-of-00001.parquet": parquet(["Another text altogether."] * 9)}
    newer = server.commit(f"datasets/{repo}", moved)
    out, _ = finished(cli(server, tmp_path / "home", *flags, "--out-dir", tmp_path / "killed"))
    assert "going on after" in out
    assert files_under(tmp_path / "killed") == files_under(tmp_path / "whole")
    for path in files_under(tmp_path / "whole"):
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert server.downloads("GET") - {"README.md"} == {"data/train-00001-of-00002.parquet"}
    assert not any(newer in path for _, path, _ in server.requests)


def test_downloads_can_be_removed_as_soon_as_their_shards_are_written(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", LAYOUTS["parquet"])
    client(PREPARE, cfg=dict(source=f"hf:{repo}", name="it", out_dir=str(tmp_path), clear_cache=True))
    assert decoded(tmp_path) == DOCUMENTS
    assert all(path.suffix in (".npy", ".json") for path in tmp_path.rglob("*"))


def test_downloads_of_an_older_revision_are_not_taken_for_the_newest(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", {"train.jsonl": jsonl(["old"] * 50)})
    cfg = dict(source=f"hf:{repo}", name="it", out_dir=str(tmp_path))
    client(PREPARE, cfg=cfg)
    newer = server.commit(f"datasets/{repo}", {"train.jsonl": jsonl(["new"] * 50)})
    for path in [*tmp_path.glob("*.npy"), tmp_path / "manifest.json"]:
        path.unlink()  # it is made again, from what there is now
    client(PREPARE, cfg=cfg)
    assert shards.verify(tmp_path)["revision"] == newer
    assert decoded(tmp_path) == ["new"] * 50


# -----------------------------------------------------------------------------
# shards from and to the Hub

PULL = "result = fineweb.main(fineweb.Config(**cfg))"


def bin_shard(tokens: np.ndarray, magic: int = 20240520) -> bytes:
    """As llm.c writes them."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def stream(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of documents of about 40 tokens."""
    ids = np.random.default_rng(seed).integers(0, 50256, count)
    ids[::40] = tokenizer.END_OF_TEXT
    return ids.astype(np.uint16)


BINS = {"fineweb_val_000000.bin": bin_shard(stream(2000)), "README.md": b"GPT-2 tokens"}
BINS |= {f"fineweb_train_{n:06d}.bin": bin_shard(stream(3000, n)) for n in (1, 2, 3, 4)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("max_shards", [0, 2])
def test_others_shards_are_only_fetched(client, server, repo, tmp_path, max_shards):
    server.commit(f"datasets/{repo}", BINS)
    cfg = dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path), max_shards=max_shards)
    client(PULL, cfg=cfg)
    wanted = [f"fineweb_train_{n:06d}.bin" for n in range(1, 1 + (max_shards or 4))]
    assert names(tmp_path) == [*wanted, "fineweb_val_000000.bin", "manifest.json"]
    manifest = shards.verify(tmp_path)
    assert [(s["split"], s["tokens"], s["documents"]) for s in manifest["shards"]] == [
        ("val", 2000, 50),
        *[("train", 3000, 75)] * len(wanted),
    ]
    assert manifest["revision"] == COMMIT
    assert server.downloads() == {*wanted, "fineweb_val_000000.bin"}
    for name in wanted:
        assert (tmp_path / name).read_bytes() == BINS[name]
    if not max_shards:  # the same data, in a folder and on the Hub, in a run's checkpoint
        same = (
            "result = hub_shards.open_folder(one).fingerprint() == hub_shards.open_folder(two).fingerprint()"
        )
        assert client(CACHE + same, one=f"hf://datasets/{repo}", two=tmp_path, cache=tmp_path / "cache")


@pytest.mark.fault(20)
def test_fetching_shards_goes_on_where_it_was_interrupted(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", BINS)
    cfg = dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path))
    server.fault(404, "fineweb_train_000003", times=1)
    client.refusal(PULL, cfg=cfg)
    with pytest.raises(ValueError, match="incomplete"):
        shards.verify(tmp_path)
    server.requests.clear()
    client(PULL, cfg=cfg)
    shards.verify(tmp_path)
    assert server.downloads() == {f"fineweb_train_{n:06d}.bin" for n in (3, 4)}
    server.requests.clear()
    assert "already complete" in client.ask(PULL, cfg=cfg)["printed"]
    assert not server.requests


def test_fetching_shards_goes_on_at_the_revision_it_began_with(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", BINS)
    cfg = dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path))
    server.fault(404, "fineweb_train_000003", times=1)
    client.refusal(PULL, cfg=cfg)
    server.commit(f"datasets/{repo}", {name: bin_shard(stream(3000, 9)) for name in BINS if "_" in name})
    client(PULL, cfg=cfg)
    assert shards.verify(tmp_path)["revision"] == COMMIT
    for name in names(tmp_path):
        assert name == "manifest.json" or (tmp_path / name).read_bytes() == BINS[name]


OUTSIDE = stream(3000)
OUTSIDE[1234] = 50300
BAD_BINS = {
    "not what its header says": (bin_shard(stream(3000))[:-2], "fineweb_train_000002.bin"),
    "of another kind": (bin_shard(stream(3000), magic=20240801), "fineweb_train_000002.bin"),
    "outside the vocabulary": (bin_shard(OUTSIDE), "token 50300 at offset 1234"),
}


@pytest.mark.parametrize(("data", "message"), BAD_BINS.values(), ids=BAD_BINS.keys())
def test_bad_shards_are_refused(client, server, repo, tmp_path, data, message):
    server.commit(f"datasets/{repo}", {**BINS, "fineweb_train_000002.bin": data})
    cfg = dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path))
    assert message in client.refusal(PULL, "ValueError", cfg=cfg)["message"]
    with pytest.raises(ValueError, match="incomplete"):
        shards.verify(tmp_path)


@pytest.mark.fault(20)
def test_a_shard_that_never_arrives_whole_is_refused(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", BINS)
    server.fault("wrong", "fineweb_train_000002", times=100)
    cfg = dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path))
    answer = client.refusal(PULL, cfg=cfg)
    assert f"{repo}@{COMMIT}/fineweb_train_000002.bin" in answer["message"]
    assert "fineweb_train_000002.bin" not in names(tmp_path)


def make_shards(folder: Path, **options) -> Path:
    """A data set of our own: a validation shard and a dozen of training, 512 tokens each."""
    source = folder.parent / "source.jsonl"
    words = np.random.default_rng(1).choice(
        ["the", "cat", "saw", "a", "dog", "and", "ran", "home"], (150, 45)
    )
    source.write_bytes(jsonl([" ".join(row) for row in words]))
    cfg = dict(source=str(source), name="ours", out_dir=str(folder), shard_tokens=512, val_tokens=512)
    fineweb.prepare(fineweb.Config(**{**cfg, **options}))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("ours") / "ours")


def on_the_hub(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_that_were_pushed_come_back_as_they_were(client, server, repo, ours, tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_bytes((ours.parent / "source.jsonl").read_bytes())
    cfg = dict(source=str(source), name="ours", shard_tokens=512, val_tokens=512, out_dir=str(tmp_path / "a"))
    server.fault(500, "lfs/", method="PUT")  # outlived
    answer = client.ask(PULL, cfg=dict(cfg, push_to=repo))
    assert f"--dataset-path hf://datasets/{repo}" in answer["printed"], answer
    pushed = server.repos[f"datasets/{repo}"]
    assert (
        pushed == on_the_hub(tmp_path / "a") == on_the_hub(ours) | {"manifest.json": pushed["manifest.json"]}
    )
    assert len(pushed) > 10
    history = list(server.commits[f"datasets/{repo}"].values())
    assert all("manifest.json" not in files for files in history[:-1])
    assert set(pushed) - set(history[-2]) == {"manifest.json"}

    server.requests.clear()
    client(PULL, cfg=dict(cfg, push_to=repo))  # there is nothing to send
    assert not [path for method, path, _ in server.requests if method == "PUT" or "/commit/" in path]

    client(PULL, cfg=dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path / "b")))
    back = on_the_hub(tmp_path / "b")
    assert back.keys() == pushed.keys()
    assert all(back[name] == pushed[name] for name in back if name != "manifest.json")
    one, two = (json.loads(files["manifest.json"])["shards"] for files in (pushed, back))
    assert one == two


@pytest.mark.slow
def test_more_shards_than_one_upload_takes(client, server, repo, tmp_path):
    files = [f"x_train_{n:06d}.npy" for n in range(120)]
    for name in files:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "manifest.json").write_bytes(b"{}")
    (tmp_path / "notes.txt").write_bytes(b"private")
    code = "hub.check_push(repo); hub.push(repo, Path(folder), files)"
    client(code, repo=repo, folder=tmp_path, files=[*files, "manifest.json"])
    history = list(server.commits[f"datasets/{repo}"].values())
    assert [len(commit) for commit in history] == [0, 50, 100, 120, 121]
    assert set(history[-1]) == {*files, "manifest.json"}


@pytest.mark.parametrize("case", ["no login", "wrong token", "no permission", "another's"])
def test_a_push_that_is_not_allowed_is_refused_before_any_work(server, repo, tmp_path, case):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    token = {"no login": "", "wrong token": "hf_WrongToken"}.get(case, TOKEN)
    if case == "another's":
        server.commit(f"datasets/{repo}", FILES)
    if case in ("no permission", "another's"):
        server.read_only.add(f"datasets/{repo}")
    flags = ["--source", tmp_path / "a.jsonl", "--out-dir", tmp_path / "out", "--push-to", repo]
    process = cli(server, tmp_path / "home", *flags, token=token)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert repo in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not token or token not in out + err


def test_an_upload_that_keeps_failing_is_said_with_the_name(client, server, repo, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"x")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    code = "hub.check_push(repo); hub.push(repo, Path(folder), ['x.npy', 'manifest.json'])"
    server.fault(500, "/commit/", times=1000, method="POST")
    answer = client.refusal(code, repo=repo, folder=tmp_path)
    assert f"{repo} could not be sent" in answer["message"]
    assert "trying again" in answer["printed"]
    assert TOKEN not in json.dumps(answer)
    server.faults.clear()
    server.fault(403, "/commit/", times=1000, method="POST")
    answer = client.refusal(code, repo=repo, folder=tmp_path)
    assert "trying again" not in answer["printed"]


# -----------------------------------------------------------------------------
# training from the Hub

CACHE = "hub_shards.HUB_CACHE = Path(cache)\n"
COMPARE = """
hub_shards.HEAD_TOKENS = head_tokens
folders = [hub_shards.open_folder(where, cache_bytes) for where in (one, two)]
local, server = [shards.ShardReader(folder, "train", seq_len, seed=7) for folder in folders]
assert isinstance(server.folder, hub_shards.HubFolder) and not isinstance(local.folder, hub_shards.HubFolder)
steps, most = int(2.5 * local.num_windows / 4) + 1, 0
for step in range(steps):
    for a, b in zip(local.batch(step, 0, 4, 4), server.batch(step, 0, 4, 4)):
        assert (a == b).all(), step
    most = max(most, bytes_of(Path(cache).rglob("*.npy")))
result = most, local.unigram_entropy() == server.unigram_entropy()
"""
SHARD_BYTES = 128 + 2 * 512


@pytest.mark.parametrize(("seq_len", "head_tokens"), [(30, 8192), (200, 64), (700, 64), (700, 8192)])
def test_batches_from_the_hub_are_those_of_the_folder(
    client, server, repo, tmp_path, monkeypatch, seq_len, head_tokens
):
    monkeypatch.setattr(shard_writer, "HEAD_TOKENS", head_tokens)
    folder = make_shards(tmp_path / "made")
    server.commit(f"datasets/{repo}", on_the_hub(folder))
    where = dict(one=folder, two=f"hf://datasets/{repo}", cache=tmp_path / "cache")
    options = dict(cache_bytes=4 * SHARD_BYTES, seq_len=seq_len, head_tokens=head_tokens)
    most, same_entropy = client(CACHE + COMPARE, **where, **options)
    assert same_entropy
    # The cache, the shard that is being fetched, and the next one in the background.
    assert 3 * SHARD_BYTES <= most <= 6 * SHARD_BYTES


CROSSING = """
hub_shards.HEAD_TOKENS = 64
reader = shards.ShardReader(hub_shards.open_folder(where), "train", 30)
begin = reader.sizes[0] - 20  # a window from the first shard into the second
result = begin, reader.read([begin])[1][0].tolist()
"""


def test_a_window_that_reaches_into_a_shard_fetches_its_start_only(
    client, server, repo, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_writer, "HEAD_TOKENS", 64)
    folder = make_shards(tmp_path / "made")
    server.commit(f"datasets/{repo}", on_the_hub(folder))
    names = dict(where=f"hf://datasets/{repo}", cache=tmp_path / "cache")
    server.fault("wrong", "ours_train_000001.npy")
    answer = client.refusal(CACHE + CROSSING, "ValueError", **names)
    assert f"{repo}@{COMMIT}/ours_train_000001.npy does not begin as its manifest" in answer["message"]
    server.requests.clear()
    begin, found = client(CACHE + CROSSING, **names)
    assert begin < 512 < begin + 31
    assert found == tokens_of(folder, "train")[begin + 1 : begin + 31].tolist()
    asked = [(path.rpartition("/")[2], part) for _, path, part in server.requests if "/resolve/" in path]
    assert asked == [("ours_train_000001.npy", f"bytes=0-{128 + 2 * 64 - 1}")]


def test_a_repository_that_does_not_match_its_manifest_is_refused(client, server, repo, ours, tmp_path):
    files = on_the_hub(ours)
    code = CACHE + "hub_shards.open_folder(where, cache_bytes)"
    names = dict(where=f"hf://datasets/{repo}", cache=tmp_path, cache_bytes=1e9)
    flipped = bytearray(files["ours_train_000002.npy"])
    flipped[-1] ^= 1
    for data in (bytes(flipped), files["ours_train_000002.npy"][:-2]):
        server.commit(f"datasets/{repo}", {**files, "ours_train_000002.npy": data})
        answer = client.refusal(code, "ValueError", **names)
        assert "ours_train_000002.npy does not have the size or SHA-256" in answer["message"]
    server.commit(f"datasets/{repo}", {name: data for name, data in files.items() if "000002" not in name})
    assert "ours_train_000002.npy, but not the file" in client.refusal(code, "ValueError", **names)["message"]
    manifest = files["manifest.json"].replace(b"ours_train_000002", b"../ours_train_000002")
    server.commit(f"datasets/{repo}", {**files, "manifest.json": manifest})
    assert "not the name of a shard" in client.refusal(code, "ValueError", **names)["message"]
    server.commit(f"datasets/{repo}", files)
    names["cache_bytes"] = 2000
    assert "room for three shards" in client.refusal(code, "ValueError", **names)["message"]


@pytest.mark.slow
def test_two_processes_share_a_cache_that_is_too_small(client, server, repo, ours, tmp_path):
    server.commit(f"datasets/{repo}", on_the_hub(ours))
    names = dict(one=ours, two=f"hf://datasets/{repo}", cache=tmp_path / "cache", head_tokens=8192)
    names |= dict(cache_bytes=3 * SHARD_BYTES, seq_len=30)
    other = Client(server, tmp_path / "home")
    try:
        other.send(CACHE + COMPARE.replace("seed=7", "seed=8"), **names)
        client(CACHE + COMPARE, **names)
        assert other.process.stdout
        answer = json.loads(other.process.stdout.readline())
        assert "error" not in answer, answer["trace"]
    finally:
        other.close()


def test_a_run_that_is_over_does_not_wait_for_the_next_shard(server, repo, ours, tmp_path):
    server.commit(f"datasets/{repo}", on_the_hub(ours))
    server.fault("stall", "ours_train_000003", times=100)
    code = CACHE + "folder = hub_shards.open_folder(where); folder.announce(folder.entries[4]); time.sleep(1)"
    names = f"cache, where = {str(tmp_path / 'cache')!r}, 'hf://datasets/{repo}'\n"
    env = {**os.environ, **server.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    imports = "import time\nfrom pathlib import Path\nfrom lib import hub_shards\n"
    program = f"{imports}{names}{code}\nprint('over', flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout and process.stdout.readline() == "over\n"
    assert "ours_train_000003.npy" in server.downloads()
    try:
        process.wait(timeout=3)
    finally:
        process.kill()
        process.communicate()
        server.faults.clear()


TRAIN = """
import runpy, sys
from pathlib import Path
from lib import hub_shards
hub_shards.HUB_CACHE = Path(sys.argv[1])
sys.argv = ["train_gpt2.py", *sys.argv[2:]]
sys.path.insert(0, {root!r})
runpy.run_path({script!r}, run_name="__main__")
"""
SHAPE = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--seq-len", "32", "--batch-size", "4"]
LENGTH = ["--total-batch-tokens", "128", "--max-steps", "60", "--warmup-steps", "5", "--val-tokens", "512"]
EVERY = ["--hellaswag-every", "0", "--sample-every", "0", "--val-every", "20", "--checkpoint-every", "50"]
TINY = [*SHAPE, *LENGTH, *EVERY, "--no-compile", "--dtype", "float32", "--device", "cpu"]


def train(server: HubServer, folder: Path, data: str | Path, *flags: str) -> subprocess.Popen:
    """train_gpt2.py, with folder/log and folder/cache instead of log/ and data/server/."""
    script = TRAIN.format(root=str(ROOT), script=str(ROOT / "train_gpt2.py"))
    places = [str(folder / "cache"), "--log-dir", str(folder / "log"), "--dataset-path", str(data)]
    env = {
        **os.environ,
        **server.environment(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *places, *flags], env=env, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def facts(run: Path) -> list[str]:
    """What the log says, but for the speed."""
    return [line for line in (run / "log.txt").read_text().splitlines() if line.split()[1] != "toks"]


@pytest.mark.slow
def test_training_outlives_a_cut_of_the_network(server, repo, ours, tmp_path):
    server.commit(f"datasets/{repo}", on_the_hub(ours))
    server.requests.clear()
    here = train(server, tmp_path, ours, *TINY, "--run-name", "local")
    there = train(
        server,
        tmp_path,
        f"hf://datasets/{repo}",
        *TINY,
        "--run-name",
        "hub",
        "--cache-gb",
        f"{4 * SHARD_BYTES / 1e9}",
    )
    wait_until(lambda: len(server.downloads()) > 5, there)
    log = tmp_path / "log" / "hub" / "log.txt"
    with server.cut():
        time.sleep(3)
        at_the_cut = len(log.read_text().splitlines()) if log.exists() else 0
        time.sleep(0.5)
        assert there.poll() is None
    finished(here)
    _, err = finished(there)
    assert at_the_cut < 60 * 4, "the run had ended before the network was cut"
    assert "refused" in err
    assert facts(tmp_path / "log" / "hub") == facts(tmp_path / "log" / "local")
    assert len(facts(tmp_path / "log" / "hub")) == 60 * 3 + 4
    assert len(list((tmp_path / "cache").rglob("*.npy"))) <= 4
    # The data are the same wherever they are: the run goes on from the folder.
    run = tmp_path / "log" / "hub"
    again = train(server, tmp_path, ours, "--resume", str(run / "step_000050"))
    finished(again)
    assert facts(run) == facts(tmp_path / "log" / "local")


@pytest.mark.slow
def test_two_training_processes_share_a_cache(server, repo, ours, tmp_path):
    server.commit(f"datasets/{repo}", on_the_hub(ours))
    flags = [*TINY, "--num-gpus", "2", "--batch-size", "2", "--cache-gb", f"{3.2 * SHARD_BYTES / 1e9}"]
    finished(train(server, tmp_path, f"hf://datasets/{repo}", *flags, "--run-name", "hub"))
    finished(train(server, tmp_path, ours, *flags, "--run-name", "local"))
    assert facts(tmp_path / "log" / "hub") == facts(tmp_path / "log" / "local")
