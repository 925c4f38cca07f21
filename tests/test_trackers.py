"""lib/trackers.py: reads back the files of TensorBoard, wandb and Trackio; secrets; failures."""

import base64
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import struct
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import before, score_items, set_variables, step_now
from helpers import ITEM
from test_security import SECRETS

from lib import run_log
from model import GPT
from train_gpt2 import Config

TOOLS = ["tensorboard", "wandb", "trackio"]


@pytest.fixture
def config(toy, tmp_path) -> Config:
    """Twelve steps with values in all streams; checkpoints at 4, 8 and 12."""
    changes = dict(log_dir=str(tmp_path / "log"), run_name="run", val_every=4, hellaswag_every=4)
    return dataclasses.replace(toy, **changes)


@pytest.fixture
def offline(tmp_path) -> list[partial]:
    """Patches for a training process: two items of HellaSwag, and tools that use no network."""
    items = tmp_path / "items.jsonl"
    items.write_text(f"{json.dumps(ITEM)}\n" * 2, encoding="utf-8")
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), **SECRETS}
    return [partial(score_items, items), partial(set_variables, environment)]


def in_step(step: int, do: Any, *args: Any):
    """Calls do(*args) in the first forward pass of a training step."""
    done = []

    def count(model, *_, **__):
        if model.training and step_now() == step and not done:
            done.append(True)
            do(*args)

    before(GPT, "forward", count)


def die(after_seconds: float, saved: Path):
    """SIGKILL, but not before this checkpoint exists: it is written in the background."""
    while not saved.exists():
        time.sleep(0.01)
    time.sleep(after_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


# -----------------------------------------------------------------------------
# reading back: curves as {name: [(x, value), ...]} in the order in which they are drawn

Curves = dict[str, list[tuple[int, float]]]


def tensorboard_curves(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def wandb_records(file: Path) -> list[Any]:
    """The records of a .wandb file: after 7 bytes a log of LevelDB's format, blocks of 32 KiB with chunks in
    them, each with a checksum, a length and a type (1: whole; 2, 3, 4: first, middle, last part)."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, at, part, records = file.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(part))
            part = b""
    return records


def wandb_curves(records: list[Any]) -> Curves:
    """The curves of one .wandb file, with `tokens`."""
    curves: Curves = {}
    for record in records:
        row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name in row.keys() & {*(stream.curve for stream in run_log.STREAMS.values()), "tokens"}:
            curves.setdefault(name, []).append((row["_step"], row[name]))
    return curves


def trackio_table(folder: Path, table: str, column: str) -> list[tuple]:
    with sqlite3.connect(folder / "gpt2.db") as database:
        return database.execute(f"SELECT run_name, {column} FROM {table} ORDER BY id").fetchall()


def trackio_curves(folder: Path) -> Curves:
    curves: Curves = {}
    for _, step, row in trackio_table(folder, "metrics", "step, metrics"):
        for name, value in json.loads(row).items():
            curves.setdefault(name, []).append((step, value))
    return curves


def of_log(run: Path, first_step: int = 0) -> Curves:
    """The curves in the log."""
    curves: Curves = {}
    for line in (run / "log.txt").read_text(encoding="utf-8").splitlines():
        step, stream, value = line.split()
        if int(step) >= first_step:
            curves.setdefault(run_log.STREAMS[stream].curve, []).append((int(step), float(value)))
    return curves


def assert_same(found: Curves, wanted: Curves):
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [x for x, _ in found[name]] == [x for x, _ in points], name
        assert [y for _, y in found[name]] == pytest.approx([y for _, y in points], rel=1e-5), name


# -----------------------------------------------------------------------------


def killed_and_resumed(
    launch, config: Config, offline: list[partial], pause: float = 0.0, **changes: Any
) -> Path:
    """A run that is killed in step 7, after a pause, and resumes at 4."""
    saved = Path(config.log_dir) / config.run_name / "step_000004"
    launch(config, patches=[*offline, partial(in_step, 7, die, pause, saved)]).wait()
    launch(dataclasses.replace(config, **changes), "--resume", patches=offline).finish()
    return Path(config.log_dir) / config.run_name


@pytest.mark.slow
def test_tensorboard_shows_what_the_log_has_across_a_kill(launch, config, offline):
    run = killed_and_resumed(launch, dataclasses.replace(config, tracker="tensorboard"), offline)
    assert len(list((run / "tensorboard").glob("events.*"))) == 2
    assert_same(tensorboard_curves(run / "tensorboard"), of_log(run))


@pytest.mark.slow
def test_wandb_has_one_run_across_a_kill_and_its_newest_folder_the_whole_curves(launch, config, offline):
    run = killed_and_resumed(launch, dataclasses.replace(config, tracker="wandb"), offline)
    first, second = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    tracker_id = json.loads((run / "step_000012/state.json").read_text(encoding="utf-8"))["tracker_id"]
    assert first.name == second.name == f"run-{tracker_id}.wandb"
    records = wandb_records(second)
    (of_run,) = (record.run for record in records if record.HasField("run"))
    assert (of_run.run_id, of_run.project, of_run.display_name) == (tracker_id, "gpt2", "run")
    found = wandb_curves(records)
    assert all(tokens == step * config.total_batch_tokens for step, tokens in found.pop("tokens"))
    assert_same(found, of_log(run))


@pytest.mark.parametrize(
    "pause",
    [0, pytest.param(2, marks=pytest.mark.slow)],
    ids=["before it has written", "when it has written"],
)
def test_trackio_shows_what_the_log_has_across_a_kill(pause, launch, config, offline, tmp_path):
    run = killed_and_resumed(launch, dataclasses.replace(config, tracker="trackio"), offline, pause)
    found = trackio_curves(tmp_path / "trackio")
    assert all(tokens == step * config.total_batch_tokens for step, tokens in found.pop("tokens"))
    # Steps that the resumed run repeats may be there twice; the last values count.
    last = {name: sorted(dict(points).items()) for name, points in found.items()}
    assert_same(last, of_log(run))
    assert {name for name, _ in trackio_table(tmp_path / "trackio", "metrics", "run_id")} == {"run"}
    assert len({run_id for _, run_id in trackio_table(tmp_path / "trackio", "metrics", "run_id")}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tracker_that_is_new_to_a_run_is_told_its_whole_log(tool, launch, config, offline, tmp_path):
    run = killed_and_resumed(launch, config, offline, tracker=tool)
    if tool == "tensorboard":
        found = tensorboard_curves(run / "tensorboard")
    elif tool == "wandb":
        (file,) = run.glob("wandb/offline-run-*/*.wandb")
        found = wandb_curves(wandb_records(file))
    else:
        found = trackio_curves(tmp_path / "trackio")
    assert_same({name: found[name] for name in found.keys() - {"tokens"}}, of_log(run))


def hyperparameters(tool: str, run: Path, trackio: Path) -> dict[str, Any]:
    if tool == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[attr-defined]

        summary = EventAccumulator(str(run / tool)).Reload().SummaryMetadata("_hparams_/session_start_info")
        sent = HParamsPluginData.FromString(summary.plugin_data.content).session_start_info.hparams
        return {key: value.number_value for key, value in sent.items()}
    if tool == "wandb":
        (file,) = run.glob("wandb/offline-run-*/*.wandb")
        (of_run,) = (record.run for record in wandb_records(file) if record.HasField("run"))
        return {update.key: json.loads(update.value_json) for update in of_run.config.update}
    ((_, text),) = trackio_table(trackio, "configs", "config")
    return json.loads(text)


@pytest.mark.fault(26)
@pytest.mark.parametrize("tool", TOOLS)
def test_the_settings_are_sent_as_hyperparameters_and_no_secrets(tool, launch, config, offline, tmp_path):
    training = launch(dataclasses.replace(config, tracker=tool, max_steps=4), patches=offline)
    printed = training.finish()
    sent = hyperparameters(tool, tmp_path / "log" / "run", tmp_path / "trackio")
    for name in ("learning_rate", "n_embd", "seed", "total_batch_tokens"):
        assert sent[name] == getattr(config, name)
    for content in [printed.encode(), *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())]:
        for secret in SECRETS.values():
            assert secret.encode() not in content
            assert base64.b64encode(secret.encode())[:-4] not in content


def test_only_rank_0_tracks(launch, config, offline):
    cfg = dataclasses.replace(config, tracker="tensorboard", max_steps=3)
    training = launch(cfg, patches=offline, world_size=2)
    training.finish()
    run = Path(config.log_dir) / "run"
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    assert "track" not in training.printed(1)
    assert_same(tensorboard_curves(run / "tensorboard"), of_log(run))


# -----------------------------------------------------------------------------
# what is missing, and what fails


def hide(*packages: str):
    """Makes these packages look as if they were not installed."""
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tracker_that_is_not_installed_is_refused_before_anything(tool, launch, config):
    training = launch(dataclasses.replace(config, tracker=tool), patches=[partial(hide, tool)])
    assert training.wait() == [2]
    assert training.printed().endswith(f"not installed: pip install {tool}\n")
    assert not Path(config.log_dir).exists()


NOWHERE = "http://127.0.0.1:9"
ONLINE = {"WANDB_MODE": "online", "WANDB_BASE_URL": NOWHERE, "NETRC": "/nonexistent"}


@pytest.mark.parametrize(
    "key", ["", pytest.param("0" * 40, marks=pytest.mark.slow)], ids=["no key", "no network"]
)
def test_wandb_without_a_login_is_refused_before_anything(key, launch, config):
    cfg = dataclasses.replace(config, tracker="wandb")
    training = launch(cfg, patches=[partial(set_variables, {**ONLINE, "WANDB_API_KEY": key})])
    assert training.wait(timeout=120) == [2]
    assert "--tracker wandb: " in training.printed() and "WANDB_MODE=offline" in training.printed()
    assert not Path(config.log_dir).exists()


@pytest.mark.slow
def test_a_run_goes_on_without_a_tracker_that_lets_it_no_longer_in(launch, config, offline):
    patches = [*offline, partial(set_variables, {**ONLINE, "WANDB_API_KEY": ""})]
    run = killed_and_resumed(launch, config, patches, tracker="wandb")
    assert len(of_log(run)["train/loss"]) == 12


def lose_the_folder(folder: Path):
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was", encoding="utf-8")


def kill_children():
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text(encoding="utf-8").split():
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("tool", ["tensorboard", "wandb"])
def test_a_tracker_that_fails_in_mid_run_is_told_once_and_training_goes_on(tool, launch, config, offline):
    run = Path(config.log_dir) / "run"
    fail = (lose_the_folder, run / "tensorboard") if tool == "tensorboard" else (kill_children,)
    cfg = dataclasses.replace(config, tracker=tool)
    printed = launch(cfg, patches=[*offline, partial(in_step, 3, *fail)]).finish()
    assert printed.count(f"note   --tracker {tool} failed") == 1
    assert [step for step, _ in of_log(run)["train/loss"]] == list(range(12))


def test_training_goes_on_where_trackios_server_does_not_answer(launch, config, offline):
    server = {"TRACKIO_SERVER_URL": f"{NOWHERE}/?write_token=x"}
    cfg = dataclasses.replace(config, tracker="trackio")
    launch(cfg, patches=[*offline, partial(set_variables, server)]).finish()
    assert len(of_log(Path(config.log_dir) / "run")["train/loss"]) == 12
