"""lib/hub_shards.py, and fineweb.py's downloads and uploads of shards: training straight from the Hub."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import DOCUMENTS, read_files, read_stream, to_bin, to_jsonl, wait_until
from helpers import ROOT, Training
from hub_server import COMMIT, TOKEN, Client

import fineweb
from lib import hub_shards, shard_writer, shards, tokenizer

# -----------------------------------------------------------------------------
# shards from and to the Hub

PULL = "result = fineweb.main(fineweb.Config(**cfg))"


def draw_stream(count: int, seed: int = 0) -> np.ndarray:
    """Draws tokens of documents of 40 tokens."""
    ids = np.random.default_rng(seed).integers(0, 50256, count)
    ids[::40] = tokenizer.END_OF_TEXT
    return ids.astype(np.uint16)


BINS = {"fineweb_val_000000.bin": to_bin(draw_stream(2000)), "README.md": b"GPT-2 tokens"}
BINS |= {f"fineweb_train_{n:06d}.bin": to_bin(draw_stream(3000, n)) for n in (1, 2, 3, 4)}


@pytest.fixture
def cfg(server, repo, tmp_path) -> dict[str, Any]:
    """Settings that fetch BINS from the Hub."""
    server.commit(f"datasets/{repo}", BINS)
    return dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path))


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("max_shards", [0, 2])
def test_others_shards_are_only_fetched(client, server, repo, tmp_path, cfg, max_shards):
    client(PULL, cfg={**cfg, "max_shards": max_shards})
    wanted = [f"fineweb_train_{n:06d}.bin" for n in range(1, 1 + (max_shards or 4))]
    assert list_names(tmp_path) == [*wanted, "fineweb_val_000000.bin", "manifest.json"]
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
        same = "one, two = hub_shards.HubFolder(one), shards.Folder(Path(two))\n"
        same += "result = one.fingerprint() == two.fingerprint()"
        assert client(CACHE + same, one=f"hf://datasets/{repo}", two=tmp_path, cache=tmp_path / "cache")


@pytest.mark.fault(34)
def test_shards_that_an_earlier_version_fetched_are_completed(client, tmp_path, cfg):
    client(PULL, cfg={**cfg, "max_shards": 2})
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["available"]  # c17ab74 wrote none, and had max_shards in the request
    manifest["request"]["max_shards"] = 2
    path.write_text(json.dumps(manifest), encoding="utf-8")
    client(PULL, cfg=cfg)
    assert sum(shard["split"] == "train" for shard in shards.verify(tmp_path)["shards"]) == 4


@pytest.mark.fault(20)
def test_fetching_shards_goes_on_where_it_was_interrupted(client, server, repo, tmp_path, cfg):
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


def test_fetching_shards_goes_on_at_the_revision_it_began_with(client, server, repo, tmp_path, cfg):
    server.fault(404, "fineweb_train_000003", times=1)
    client.refusal(PULL, cfg=cfg)
    server.commit(f"datasets/{repo}", {name: to_bin(draw_stream(3000, 9)) for name in BINS if "_" in name})
    client(PULL, cfg=cfg)
    assert shards.verify(tmp_path)["revision"] == COMMIT
    for name in list_names(tmp_path):
        assert name == "manifest.json" or (tmp_path / name).read_bytes() == BINS[name]


OUTSIDE = draw_stream(3000)
OUTSIDE[1234] = 50300
BAD_BINS = {
    "not what its header says": (to_bin(draw_stream(3000))[:-2], "fineweb_train_000002.bin"),
    "of another kind": (to_bin(draw_stream(3000), magic=20240801), "fineweb_train_000002.bin"),
    "outside the vocabulary": (to_bin(OUTSIDE), "token 50300 at offset 1234"),
}


@pytest.mark.parametrize(("data", "message"), BAD_BINS.values(), ids=BAD_BINS.keys())
def test_bad_shards_are_refused(client, server, repo, tmp_path, cfg, data, message):
    server.commit(f"datasets/{repo}", {**BINS, "fineweb_train_000002.bin": data})
    assert message in client.refusal(PULL, "ValueError", cfg=cfg)["message"]
    with pytest.raises(ValueError, match="incomplete"):
        shards.verify(tmp_path)


@pytest.mark.fault(20)
def test_a_shard_that_never_arrives_whole_is_refused(client, server, repo, tmp_path, cfg):
    server.fault("wrong", "fineweb_train_000002", times=100)
    answer = client.refusal(PULL, cfg=cfg)
    assert f"{repo}@{COMMIT}/fineweb_train_000002.bin" in answer["message"]
    assert "fineweb_train_000002.bin" not in list_names(tmp_path)


def make_shards(folder: Path, **options) -> Path:
    """Makes a data set of one validation shard and a dozen training shards, of 512 tokens each."""
    source = folder.parent / "source.jsonl"
    words = np.random.default_rng(1).choice(
        ["the", "cat", "saw", "a", "dog", "and", "ran", "home"], (150, 45)
    )
    source.write_bytes(to_jsonl([" ".join(row) for row in words]))
    cfg = dict(source=str(source), name="ours", out_dir=str(folder), shard_tokens=512, val_tokens=512)
    fineweb.prepare(fineweb.Config(**{**cfg, **options}))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("ours") / "ours")


def test_shards_that_were_pushed_come_back_as_they_were(client, server, repo, ours, tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_bytes((ours.parent / "source.jsonl").read_bytes())
    cfg = dict(source=str(source), name="ours", shard_tokens=512, val_tokens=512, out_dir=str(tmp_path / "a"))
    server.fault(500, "lfs/", method="PUT")  # outlived
    answer = client.ask(PULL, cfg=dict(cfg, push_to=repo))
    assert f"--dataset-path hf://datasets/{repo}" in answer["printed"], answer
    pushed = server.repos[f"datasets/{repo}"]
    assert (
        pushed == read_files(tmp_path / "a") == read_files(ours) | {"manifest.json": pushed["manifest.json"]}
    )
    assert len(pushed) > 10
    history = list(server.commits[f"datasets/{repo}"].values())
    assert all("manifest.json" not in files for files in history[:-1])
    assert set(pushed) - set(history[-2]) == {"manifest.json"}

    server.requests.clear()
    client(PULL, cfg=dict(cfg, push_to=repo))  # there is nothing to send
    assert not [path for method, path, _ in server.requests if method == "PUT" or "/commit/" in path]

    client(PULL, cfg=dict(source=f"hf://datasets/{repo}", out_dir=str(tmp_path / "b")))
    back = read_files(tmp_path / "b")
    assert back.keys() == pushed.keys()
    assert all(back[name] == pushed[name] for name in back if name != "manifest.json")
    one, two = (json.loads(files["manifest.json"])["shards"] for files in (pushed, back))
    assert one == two


@pytest.mark.parametrize("case", ["no login", "wrong token", "no permission", "another's"])
def test_a_push_that_is_not_allowed_is_refused_before_any_work(start, server, repo, tmp_path, case):
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(DOCUMENTS))
    token = {"no login": "", "wrong token": "hf_WrongToken"}.get(case, TOKEN)
    if case == "another's":
        server.commit(f"datasets/{repo}", {"README.md": b"theirs"})
    if case in ("no permission", "another's"):
        server.read_only.add(f"datasets/{repo}")
    flags = ["--source", tmp_path / "a.jsonl", "--out-dir", tmp_path / "out", "--push-to", repo]
    pushing = start(None, *flags, script="fineweb.py", token=token, patience=10)
    assert pushing.wait() == [2]
    assert repo in pushing.printed() and "Traceback" not in pushing.printed()
    assert not (tmp_path / "out").exists()
    assert not token or token not in pushing.printed()


# -----------------------------------------------------------------------------
# training from the Hub

CACHE = "hub_shards.HUB_CACHE = Path(cache)\n"
COMPARE = """
hub_shards.HEAD_TOKENS = head_tokens
folders = shards.Folder(Path(one)), hub_shards.HubFolder(two, cache_bytes)
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
    server.commit(f"datasets/{repo}", read_files(folder))
    where = dict(one=folder, two=f"hf://datasets/{repo}", cache=tmp_path / "cache")
    options = dict(cache_bytes=4 * SHARD_BYTES, seq_len=seq_len, head_tokens=head_tokens)
    most, same_entropy = client(CACHE + COMPARE, **where, **options)
    assert same_entropy
    # The cache, the shard that is being fetched, and the next one in the background.
    assert 3 * SHARD_BYTES <= most <= 6 * SHARD_BYTES


CROSSING = """
hub_shards.HEAD_TOKENS = 64
reader = shards.ShardReader(hub_shards.HubFolder(where), "train", 30)
begin = reader.sizes[0] - 20  # a window from the first shard into the second
result = begin, reader.read([begin])[1][0].tolist()
"""


def test_a_window_that_reaches_into_a_shard_fetches_its_start_only(
    client, server, repo, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_writer, "HEAD_TOKENS", 64)
    folder = make_shards(tmp_path / "made")
    server.commit(f"datasets/{repo}", read_files(folder))
    names = dict(where=f"hf://datasets/{repo}", cache=tmp_path / "cache")
    server.fault("wrong", "ours_train_000001.npy")
    answer = client.refusal(CACHE + CROSSING, "ValueError", **names)
    assert f"{repo}@{COMMIT}/ours_train_000001.npy does not begin as its manifest" in answer["message"]
    server.requests.clear()
    begin, found = client(CACHE + CROSSING, **names)
    assert begin < 512 < begin + 31
    assert found == read_stream(folder, "train")[begin + 1 : begin + 31].tolist()
    asked = [(path.rpartition("/")[2], part) for _, path, part in server.requests if "/resolve/" in path]
    assert asked == [("ours_train_000001.npy", f"bytes=0-{128 + 2 * 64 - 1}")]


def test_a_repository_that_does_not_match_its_manifest_is_refused(client, server, repo, ours, tmp_path):
    files = read_files(ours)
    code = CACHE + "hub_shards.HubFolder(where, cache_bytes)"
    names = dict(where=f"hf://datasets/{repo}", cache=tmp_path, cache_bytes=1e9)
    whole = files["ours_train_000002.npy"]
    for data in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-2]):
        server.commit(f"datasets/{repo}", {**files, "ours_train_000002.npy": data})
        answer = client.refusal(code, "ValueError", **names)
        assert "ours_train_000002.npy does not have the size or SHA-256" in answer["message"]
    server.commit(f"datasets/{repo}", {name: data for name, data in files.items() if "000002" not in name})
    assert "lacks ours_train_000002.npy, which" in client.refusal(code, "ValueError", **names)["message"]
    manifest = files["manifest.json"].replace(b"ours_train_000002", b"../ours_train_000002")
    server.commit(f"datasets/{repo}", {**files, "manifest.json": manifest})
    assert "not the name of a shard" in client.refusal(code, "ValueError", **names)["message"]
    server.commit(f"datasets/{repo}", files)
    names["cache_bytes"] = 2000
    assert (
        "--cache-gb is 2e-06; it must be at least" in client.refusal(code, "ValueError", **names)["message"]
    )


@pytest.mark.slow
def test_two_processes_share_a_cache_that_is_too_small(client, server, repo, ours, tmp_path):
    server.commit(f"datasets/{repo}", read_files(ours))
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
    server.commit(f"datasets/{repo}", read_files(ours))
    server.fault("stall", "ours_train_000003", times=100)
    code = CACHE + "folder = hub_shards.HubFolder(where); folder.announce(folder.entries[4]); time.sleep(1)"
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


def set_cache(folder: Path):
    """A patch: shards are kept in this folder instead of in data/hub/."""
    hub_shards.HUB_CACHE = folder


@pytest.fixture
def train(start, toy, tmp_path) -> Callable[..., Training]:
    """Starts 60 steps of train_gpt2.py, with tmp_path/log and tmp_path/cache for log/ and data/hub/."""

    def train(
        data: str | Path, *words: str, run_name: str, cache_gb: float = 20.0, world_size: int = 1
    ) -> Training:
        shape: dict = dict(n_layer=1, n_head=1, n_embd=16, seq_len=32, batch_size=2, total_batch_tokens=128)
        steps: dict = dict(max_steps=60, warmup_steps=5, val_every=20, val_tokens=512, checkpoint_every=50)
        cfg = dataclasses.replace(
            toy, dataset_path=str(data), log_dir=str(tmp_path / "log"), run_name=run_name, dropout=0.0,
            cache_gb=cache_gb, **shape, **steps,
        )  # fmt: skip
        return start(cfg, *words, patches=(partial(set_cache, tmp_path / "cache"),), world_size=world_size)

    return train


def read_log(run: Path) -> list[str]:
    """Returns the log's lines except the speed."""
    return [line for line in (run / "log.txt").read_text().splitlines() if line.split()[1] != "toks"]


@pytest.mark.slow
def test_training_outlives_a_cut_of_the_network(train, server, repo, ours, tmp_path):
    server.commit(f"datasets/{repo}", read_files(ours))
    here = train(ours, run_name="local")
    there = train(f"hf://datasets/{repo}", run_name="hub", cache_gb=4 * SHARD_BYTES / 1e9)
    wait_until(lambda: len(server.downloads()) > 5)
    log = tmp_path / "log" / "hub" / "log.txt"
    with server.cut():
        there.wait_for("refused")
        at_the_cut = len(log.read_text().splitlines()) if log.exists() else 0
        assert there.is_running()
    here.finish()
    there.finish()
    assert at_the_cut < 60 * 4, "the run had ended before the network was cut"
    assert read_log(tmp_path / "log" / "hub") == read_log(tmp_path / "log" / "local")
    assert len(read_log(tmp_path / "log" / "hub")) == 60 * 3 + 4
    assert len(list((tmp_path / "cache").rglob("*.npy"))) <= 4
    # The data are the same wherever they are: the run goes on from the folder.
    run = tmp_path / "log" / "hub"
    train(ours, "--resume", str(run / "step_000050"), run_name="hub").finish()
    assert read_log(run) == read_log(tmp_path / "log" / "local")


@pytest.mark.slow
def test_two_training_processes_share_a_cache(train, server, repo, ours, tmp_path):
    server.commit(f"datasets/{repo}", read_files(ours))
    options: dict = dict(cache_gb=3.2 * SHARD_BYTES / 1e9, world_size=2)
    train(f"hf://datasets/{repo}", run_name="hub", **options).finish()
    train(ours, run_name="local", **options).finish()
    assert read_log(tmp_path / "log" / "hub") == read_log(tmp_path / "log" / "local")
