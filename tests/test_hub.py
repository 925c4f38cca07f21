"""lib/hub.py: lists, downloads and uploads over good and bad networks."""

import json
import threading
import time

import numpy as np
import pytest
from corpora import wait_until
from hub_server import COMMIT, TOKEN, Client, list_files

from lib import hub

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
    assert list_files(tmp_path) == {path}
    left = {p.suffix for p in tmp_path.glob(".incoming/**/*") if p.is_file()}
    assert left <= {".lock", ".metadata", ".TAG", ""}


FAULTS = {code: str(code) for code in (404, 401, 403, 429, 500)}
FAULTS |= {"html": "", "wrong": "bytes arrived", "truncate": ""}


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
    assert list_files(tmp_path) == set()
    assert TOKEN not in json.dumps(answer)
    tried_again = "trying again" in answer["printed"]
    assert tried_again == (kind not in (401, 403, 404))  # a retry is useless


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


@pytest.mark.parametrize("reached", [False, True])
def test_a_name_without_an_address_is_retried_only_after_the_hub_was_reached(client, server, repo, reached):
    code = """
import socket
from huggingface_hub import close_session
hub.was_reached, real = reached, socket.getaddrinfo
def fail(*args, **kwargs): raise socket.gaierror(-3, "Temporary failure in name resolution")
close_session()
socket.getaddrinfo = fail
try: hub.list_hub(repo)
finally: socket.getaddrinfo = real"""
    answer = client.refusal(code, "OSError", repo=repo, reached=reached)
    assert "no network: the name of http" in answer["message"]
    assert bool(answer["slept"]) == reached


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
    assert list_files(tmp_path / "folder") == set()
    client(FETCH, **names)
    assert (tmp_path / "folder/data/some.npy").read_bytes() == FILES["data/some.npy"]
    assert not list(tmp_path.rglob("*.incomplete"))


def test_patience_has_an_end_and_the_pauses_grow(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def attempt():
        raise ConnectionError("the line is dead")

    with pytest.raises(OSError, match=r"^it could not be read .*the line is dead"):
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

    with pytest.raises(OSError, match="could not be read"):
        hub.retry("outer", lambda: hub.retry("inner", attempt))


def test_the_start_of_a_file_is_read_alone(client, server, repo):
    server.commit(f"datasets/{repo}", {"big.npy": BIG})
    before = server.sent
    code = "result = list(hub.read_start(hub.list_hub(repo)[1]['big.npy'], 1000))"
    assert bytes(client(code, repo=repo)) == BIG[:1000]
    assert [part for method, path, part in server.requests if "/resolve/" in path] == ["bytes=0-999"]
    assert server.sent - before < 5000


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


def test_an_upload_that_keeps_failing_is_said_with_the_name(client, server, repo, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"x")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    code = "hub.check_push(repo); hub.push(repo, Path(folder), ['x.npy', 'manifest.json'])"
    server.fault(500, "/commit/", times=1000, method="POST")
    answer = client.refusal(code, repo=repo, folder=tmp_path)
    assert f"{repo} could not be uploaded" in answer["message"]
    assert "trying again" in answer["printed"]
    assert TOKEN not in json.dumps(answer)
    server.faults.clear()
    server.fault(403, "/commit/", times=1000, method="POST")
    answer = client.refusal(code, repo=repo, folder=tmp_path)
    assert "trying again" not in answer["printed"]
