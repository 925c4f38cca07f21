"""Runs and the Hugging Face Hub: what is refused before the first step, uploads that are disturbed, runs that
go on from there. Row 27 of docs/reliability.md, by the real huggingface_hub against hub_server.py."""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from corpora import wait_until
from faults import each_training_forward, hold_in_save, hold_in_step
from helpers import draw_pictures, end_of, lines_of, resealed, values
from hub_server import COMMIT, HubServer

from lib import checkpoint, run_folder, runs
from train_gpt2 import Config

pytestmark = pytest.mark.fault(27)
REPO = "me/toy"


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub for one test: these runs all push to the same repository."""
    with HubServer({}) as server:
        yield server
        server.let_go()


@pytest.fixture
def config(toy, tmp_path) -> Config:
    return dataclasses.replace(toy, log_dir=str(tmp_path / "log"), run_name="run", hub_repo=REPO)


PULL = "from lib import hub_runs; result = str(hub_runs.pull(location, Path(log), name))"


def gate(folder: Path) -> Path:
    folder.mkdir()
    return folder


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_the_hub(run: Path, step: int) -> dict[str, bytes]:
    """Returns the files of a checkpoint's upload, without the picture and the card."""
    return bytes_in(run / f"step_{step:06d}") | {"log.txt": (run / "log.txt").read_bytes()}


def listing(folder: Path) -> dict[str, int]:
    """Returns every path below a folder and its time of change."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def written_out(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def steps_on(server: HubServer) -> list[int]:
    """The step of each commit of the repository, of which every one holds a checkpoint, whole."""
    first, *later = server.commits[REPO].values()
    assert first == {}
    found = []
    for files in later:
        state = json.loads(files["state.json"])
        for name, digest in state["files"].items():
            assert hashlib.sha256(files[name]).hexdigest() == digest
        found.append(state["step"])
    return found


# -----------------------------------------------------------------------------
# before the first step


REFUSALS = {
    "no login": ("hf auth login", dict(token="")),
    "wrong token": ("Invalid user token", dict(token="hf_WrongToken")),
    "no permission": ("403", {}),
    "another's": ("403", {}),
    "offline": ("Offline", dict(environment={"HF_HUB_OFFLINE": "1"})),
    "no name": ("does not name a model", {}),
}


def test_a_repository_that_cannot_be_written_is_refused_before_the_first_step(
    start, config, server, tmp_path, tally
):
    server.commit("me/another", {"README.md": b"theirs"})
    server.read_only |= {"me/another", "me/no"}
    names = {"no permission": "me/no", "another's": "me/another", "no name": "../../evil"}
    begun = {}
    for case, (_, options) in REFUSALS.items():
        cfg = dataclasses.replace(config, run_name=case.replace(" ", "-").replace("'", ""))
        cfg = dataclasses.replace(cfg, hub_repo=names.get(case, REPO))
        begun[case] = start(cfg, **options), cfg.hub_repo
    for attempt in tally(len(REFUSALS), len(REFUSALS)):
        case, (said, _) = list(REFUSALS.items())[attempt.number]
        training, name = begun[case]
        assert training.wait() == [2], training.printed()
        assert name in training.printed() and said in training.printed(), training.printed()
        assert "Traceback" not in training.printed()
    assert not (tmp_path / "log").exists()
    assert server.repos == {"me/another": {"README.md": b"theirs"}}


# -----------------------------------------------------------------------------
# uploads


def test_a_run_puts_its_checkpoints_its_log_and_its_card_on_the_hub(start, config, server, whole, tmp_path):
    from transformers import AutoModelForCausalLM

    cfg = dataclasses.replace(config, val_every=4, checkpoint_every=12)
    printed = start(cfg, patches=(draw_pictures,)).finish()
    run = tmp_path / "log" / "run"
    assert f"step_000012 is on the Hub: {REPO}" in printed and "is not on the Hub" not in printed
    assert end_of(run) == end_of(whole())
    assert steps_on(server) == [12]
    files = server.repos[REPO]
    extra = {"log.txt", "loss.png", "README.md"}
    assert {name: data for name, data in files.items() if name not in extra} == bytes_in(run / "step_000012")
    folder = written_out(files, tmp_path / "step_000012")
    checkpoint.verify(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    ours = checkpoint.load(run / "step_000012").model
    assert theirs.transformer.wte.weight.equal(ours.wte.weight[: ours.config.vocab_size])
    assert files["log.txt"] == (run / "log.txt").read_bytes()
    assert files["loss.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    found = re.search(r"\| validation loss \| ([\d.]+) nats per token", card)
    assert found and float(found[1]) == pytest.approx(values(run, "val")[-1], abs=1e-4)
    assert "| step | 12 of 12; 768 tokens seen |" in card
    assert f"--resume hf://{REPO}" in card and f'model="{REPO}"' in card


DISTURBANCES = [  # what happens to the first request of a kind, once; or for a time
    ("drop", "^lfs/", "PUT"),
    "cut",
    (500, "/commit/", "POST"),
    (500, "^lfs/", "PUT"),
    (429, "^lfs/", "PUT"),
    ("drop", "/commit/", "POST"),
    ("html", "/commit/", "POST"),
    (503, "/preupload/", "POST"),
    ("html", "/preupload/", "POST"),
    (500, "objects/batch", "POST"),
    ("drop", "objects/batch", "POST"),
]


@pytest.mark.slow
def test_an_upload_that_is_disturbed_is_tried_again_and_training_goes_on(
    start, config, server, whole, tmp_path, tally
):
    for attempt in tally(2, len(DISTURBANCES)):
        server.forget(REPO)
        cfg = dataclasses.replace(config, run_name=f"run{attempt.number}")
        kind = DISTURBANCES[attempt.number]
        if kind == "cut":
            place = gate(tmp_path / f"gate{attempt.number}")
            training = start(cfg, patches=(partial(hold_in_step, 8, place),))
            training.wait_for(place / "reached")  # step 8's checkpoint is being saved or sent
            with server.cut():
                (place / "go").touch()
                training.wait_for("trying again")
        else:
            server.fault(kind[0], kind[1], method=kind[2])
            training = start(cfg)
        printed = training.finish()
        assert not server.faults and f"step_000012 is on the Hub: {REPO}" in printed, printed
        assert "is not on the Hub" not in printed
        assert steps_on(server)[-1] == 12
        assert end_of(tmp_path / "log" / cfg.run_name) == end_of(whole())


@pytest.mark.slow
def test_what_never_arrived_is_named_at_the_end_and_sent_by_a_resume(
    start, config, server, whole, tmp_path, tally
):
    kinds = ["cut", 403, 500, "drop"]
    for attempt in tally(1, len(kinds)):
        kind = kinds[attempt.number]
        server.forget(REPO)
        cfg = dataclasses.replace(config, run_name=f"run{attempt.number}", checkpoint_every=12)
        run, place = tmp_path / "log" / cfg.run_name, gate(tmp_path / f"gate{attempt.number}")
        training = start(cfg, patience=2, patches=(partial(hold_in_step, 2, place),))
        training.wait_for(place / "reached")
        with server.cut() if kind == "cut" else contextlib.nullcontext():
            if kind != "cut":
                server.fault(kind, "/commit/", times=1000, method="POST")
            (place / "go").touch()
            printed = training.finish()
        assert re.search(r"step_000012 is not on the Hub yet: .*could not be uploaded to", printed), printed
        assert re.search(
            rf"step_000012 is not on the Hub; to send it: .*train_gpt2.py --resume {run}\n", printed
        ), printed
        assert ("trying again" in printed) == (kind != 403)
        assert end_of(run) == end_of(whole())
        assert set(server.repos[REPO]) == set() or steps_on(server)
        server.faults.clear()
        before = len(server.commits[REPO])
        printed = start(None, "--resume", str(run)).finish()
        assert f"step_000012 is on the Hub: {REPO}" in printed
        assert "is not on the Hub" not in printed
        assert len(server.commits[REPO]) == before + 1 and steps_on(server)[-1] == 12
        assert end_of(run) == end_of(whole())


@pytest.mark.slow
def test_of_the_checkpoints_that_wait_only_the_newest_is_sent_and_none_is_removed_meanwhile(
    start, config, server, whole, tmp_path
):
    server.fault("hold", "^lfs/", method="PUT")
    training = start(dataclasses.replace(config, checkpoint_every=1, keep_last=1))
    training.wait_for("waiting for step_000001 to reach me/toy")
    run = tmp_path / "log" / "run"
    assert {1, 12} <= {checkpoint.verify(folder)["step"] for folder in checkpoint.list_steps(run)}
    assert len(checkpoint.list_steps(run)) <= 3
    server.let_go()
    training.finish()
    assert steps_on(server) == [1, 12]
    assert end_of(run) == end_of(whole())


def let_upload_end(step: int):
    """In a step, a patch: training goes on when no upload is on its way."""

    def wait(at_step: int, micro_step: int):
        if (at_step, micro_step) == (step, 2):
            while any(isinstance(thread, runs.Upload) for thread in threading.enumerate()):
                time.sleep(0.01)

    each_training_forward(wait)


def test_what_is_sent_next_is_not_removed_by_a_save_that_had_begun_before(start, config, server, tmp_path):
    """While step 3 is written, the upload of step 1 ends. Step 2, which waited for it, is not sent then: it
    will be removed, and step 3 be there."""
    server.fault("hold", "^lfs/", method="PUT")
    in_save, in_step, run = gate(tmp_path / "save"), gate(tmp_path / "step"), tmp_path / "log" / "run"
    cfg = dataclasses.replace(config, checkpoint_every=1, keep_last=1, max_steps=4)
    patches = (
        partial(hold_in_save, 3, in_save),
        partial(hold_in_step, 3, in_step),
        partial(let_upload_end, 3),
    )
    training = start(cfg, patches=patches)
    training.wait_for(in_save / "reached")
    training.wait_for(in_step / "reached")
    assert server.held.wait(30)
    server.let_go()
    wait_until(lambda: steps_on(server) == [1])
    (in_step / "go").touch()
    training.wait_for("step_000001 is on the Hub")
    (in_save / "go").touch()
    training.wait_for("saved step_000003")  # and old ones are removed
    assert not (run / "step_000002").exists()
    printed = training.finish()
    assert "is not on the Hub" not in printed
    assert 2 not in steps_on(server) and steps_on(server)[-1] == 4


@pytest.mark.slow
def test_a_run_goes_on_while_there_is_no_hub_but_does_not_begin(start, config, server, whole, tmp_path):
    start(dataclasses.replace(config, max_steps=8)).finish()
    with server.cut():
        printed = start(config, "--resume", patience=2).finish()
        assert "note   checkpoints wait for the Hub: me/toy" in printed
        assert "step_000012 is not on the Hub; to send it: " in printed
        training = start(dataclasses.replace(config, run_name="new"), patience=2)
        assert training.wait() == [2] and not (tmp_path / "log" / "new").exists()
    assert end_of(tmp_path / "log" / "run")[1] != end_of(whole())[1]  # its schedule was another
    assert steps_on(server)[-1] == 8


def test_a_new_run_does_not_replace_another_on_the_hub(start, config, server):
    start(config).finish()
    before = steps_on(server)
    for words in ([], ["--resume"]):
        training = start(dataclasses.replace(config, run_name="new"), *words)
        assert training.wait() == [2]
        assert "me/toy holds a checkpoint: go on with it (--resume hf://me/toy)" in training.printed()
    assert steps_on(server) == before


def test_a_signal_does_not_wait_for_an_upload(start, config, server, whole, tmp_path, tally):
    places = [("^lfs/", "PUT"), ("/commit/", "POST"), ("/preupload/", "POST")]
    for attempt in tally(1, len(places)):
        server.forget(REPO)
        cfg = dataclasses.replace(config, run_name=f"run{attempt.number}")
        run, place = tmp_path / "log" / cfg.run_name, gate(tmp_path / f"gate{attempt.number}")
        server.fault("hold", places[attempt.number][0], method=places[attempt.number][1])
        # Step 8 waits for the checkpoint of step 4 to be written, so that its upload has begun in step 9.
        training = start(cfg, patches=(partial(hold_in_step, 9, place),))
        assert server.held.wait(30), training.printed()
        training.wait_for(place / "reached")
        training.signal(signal.SIGTERM)
        (place / "go").touch()
        begin = time.monotonic()
        assert training.wait(timeout=30) == [143], training.printed()
        assert time.monotonic() - begin < 20  # the server would hold it for a minute
        assert (
            f"train_gpt2.py --resume {run}\n"
            in training.printed().partition("step_000010 is not on the Hub; ")[2]
        )
        server.let_go()
        printed = start(None, "--resume", str(run)).finish()
        assert "resumed at step 10" in printed and f"step_000012 is on the Hub: {REPO}" in printed
        assert steps_on(server)[-1] == 12
        assert end_of(run) == end_of(whole())
        server.held.clear()
        server.released.clear()


# -----------------------------------------------------------------------------
# going on from the Hub


def log_of(run: Path) -> list[str]:
    """The whole log but for the speed."""
    return lines_of(run, "train", "val", "lr", "norm")


def test_a_run_goes_on_from_the_hub_in_an_empty_folder_to_the_same_end(
    start, config, server, whole, tmp_path, tally
):
    worlds = [(1, 8), (2, 8), (1, 4), (1, 12), (2, 4)]  # processes that pull at the same time, step
    for attempt in tally(2, len(worlds)):
        world_size, step = worlds[attempt.number]
        undisturbed, log_dir = whole(world_size), tmp_path / f"log{attempt.number}"
        server.commit(REPO, on_the_hub(undisturbed, step))
        server.requests.clear()
        words = ["--resume", f"hf://{REPO}", "--log-dir", str(log_dir), "--checkpoint-every", "4"]
        printed = start(None, *words, token="", world_size=world_size).finish()
        assert f"resumed at step {step}" in printed
        assert end_of(log_dir / "whole") == end_of(undisturbed)
        assert log_of(log_dir / "whole") == log_of(undisturbed)
        fetched = [path for method, path, _ in server.requests if method == "GET" and "/resolve/" in path]
        names = [path.rpartition("/")[2] for path in fetched]
        assert names.count("model.safetensors") == names.count("optimizer.safetensors") == 1
        assert [path.name for path in log_dir.iterdir() if path.name not in ("whole", ".hub")] == []


def test_a_run_goes_on_from_an_older_commit_and_under_another_name(start, server, whole, tmp_path):
    undisturbed = whole()
    for step in (4, 8):
        server.commit(REPO, on_the_hub(undisturbed, step))
    words = ["--log-dir", str(tmp_path), "--run-name", "mine", "--hub-repo", "me/other"]
    printed = start(None, "--resume", f"hf://{REPO}@{COMMIT}", *words).finish()
    assert "resumed at step 4" in printed
    assert end_of(tmp_path / "mine") == end_of(undisturbed)
    assert json.loads(server.repos["me/other"]["state.json"])["step"] == 12
    assert json.loads(server.repos[REPO]["state.json"])["step"] == 8


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {other: data for other, data in files.items() if other != name}


def flipped(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    data = bytearray(files[name])
    data[len(data) // 2] ^= 4
    return {**files, name: bytes(data)}


def test_a_damaged_repository_is_refused_by_name_and_nothing_is_left(
    client, shared_hub, repo, whole, tmp_path, tally
):
    files = on_the_hub(whole(), 8)
    names = [
        "model.safetensors", "tokenizer.json", "config.json", "optimizer.safetensors",
        "generation_config.json", "tokenizer_config.json",
    ]  # fmt: skip
    kinds = [
        ("state.json", without(files, "state.json"), "holds no training state"),
        ("state.json", flipped(files, "state.json"), "damaged"),
        *(
            kind
            for name in names
            for kind in (
                (name, without(files, name), f"is not whole: {name} is missing"),
                (name, flipped(files, name), f"{name} is damaged"),
            )
        ),
    ]
    for attempt in tally(5, len(kinds)):
        name, damaged, said = kinds[attempt.number]
        shared_hub.commit(repo, damaged)
        log = tmp_path / f"log{attempt.number}"
        answer = client.refusal(PULL, "ValueError", location=f"hf://{repo}", log=log, name="")
        assert said in answer["message"] and name in answer["message"], answer
        assert not log.exists() or [path.name for path in log.iterdir()] == [".hub"]
        # Once it is mended, it is taken.
        if attempt.number in (0, 3):
            shared_hub.commit(repo, files)
            folder = client(PULL, location=f"hf://{repo}", log=log, name="")
            assert bytes_in(Path(folder)) == without(files, "log.txt")


def test_wrong_bytes_on_the_way_are_fetched_again_or_refused(
    client, shared_hub, repo, whole, tmp_path, tally
):
    files = on_the_hub(whole(), 8)
    shared_hub.commit(repo, files)
    kinds = ["wrong", "truncate", 500, "html", "stall"]
    for attempt in tally(2, len(kinds)):
        for name in ("model.safetensors", "state.json"):
            log = tmp_path / f"log{attempt.number}{name}"
            where = dict(location=f"hf://{repo}", log=log, name="")
            if kinds[attempt.number] != "stall":  # which would take a minute
                shared_hub.fault(kinds[attempt.number], name, times=1000)
                answer = client.refusal(PULL, **where)
                assert f"{repo}@{COMMIT}/{name} could not be read" in answer["message"], answer
                assert not (log / "whole").exists()
                shared_hub.faults.clear()
            shared_hub.fault(kinds[attempt.number], name)
            assert bytes_in(Path(client(PULL, **where))) == without(files, "log.txt")
            assert not shared_hub.faults


def test_a_folder_in_use_is_not_touched(client, shared_hub, repo, whole, tmp_path):
    shared_hub.commit(repo, on_the_hub(whole(), 8))
    shutil.copytree(whole(), tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "step_000008")
    lock = run_folder.lock(tmp_path / "whole")
    before = listing(tmp_path / "whole")
    where = dict(location=f"hf://{repo}", log=tmp_path, name="")
    answer = client.refusal(PULL, "ValueError", **where)
    assert f"{tmp_path / 'whole'} is in use by another process" in answer["message"]
    assert listing(tmp_path / "whole") == before
    run_folder.unlock(lock)
    assert client(PULL, **where) == str(tmp_path / "whole" / "step_000008")


def test_a_checkpoint_that_is_here_already_is_used_if_it_is_the_same_and_replaced_if_not(
    client, shared_hub, repo, whole, tmp_path
):
    files = on_the_hub(whole(), 8)
    shared_hub.commit(repo, files)
    shutil.copytree(whole(), tmp_path / "whole")
    here, where = tmp_path / "whole" / "step_000008", dict(location=f"hf://{repo}", log=tmp_path, name="")
    before = listing(tmp_path / "whole")
    shared_hub.requests.clear()
    assert client(PULL, **where) == str(here)
    assert listing(tmp_path / "whole") == before and shared_hub.downloads() == {"state.json"}
    for change in ("a bit", "a file", "another run's"):
        if change == "a bit":
            (here / "model.safetensors").write_bytes(flipped(files, "model.safetensors")["model.safetensors"])
        elif change == "a file":
            (here / "optimizer.safetensors").unlink()
        else:
            resealed(here, best_val_loss=1.0)
            checkpoint.verify(here)
        assert client(PULL, **where) == str(here)
        assert bytes_in(here) == without(files, "log.txt")
        checkpoint.verify(here)
        left = sorted(path.name for path in (tmp_path / "whole").iterdir())
        assert left == ["log.txt", "settings.json", "step_000004", "step_000008", "step_000012"]
