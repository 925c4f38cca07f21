"""Files of earlier and of later versions: read and gone on with, or refused by name (row 34).

The fixtures are runs and data sets that earlier commits made. A run has twelve steps: its shards, its log of
all steps, its checkpoint of step 6. Its weights began (--init-from) with zeros for tokens that the data lack,
which keeps it small. A data set has its text, `whole` as the commit made it, and `toy`, where the commit was
killed as it renamed the third training shard.
"""

import dataclasses
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, resealed, resume, train, values

import plot
from lib import checkpoint, files, hub_runs, runs, shards

# The last commit, or one of the last, that wrote so.
RUNS = {
    "90ef396": "settings in config.json; no world_size; the data's hash without the tokenizer",
    "a349cd8": "evaluated, val_loss, bad_steps",
    "42e442d": "model, trained_on, world_size, hellaswag, recent_losses",
    "6bad787": "the data's hash with the tokenizer; tracker_id",
    "a2d1c23": "vocab.json, merges.txt; torch.optim.Muon",
    "0331473": "settings.json; figures, model_py; Muon in batches",
}
# 72b6606 rounds float32 products otherwise; Muon's are in bfloat16, which CPUs round differently.
TOLERANCE = {"90ef396": 1e-3, "a349cd8": 1e-3, "42e442d": 1e-3, "a2d1c23": 5e-4, "0331473": 5e-4}
if not torch.cpu._is_avx512_bf16_supported():
    TOLERANCE["6bad787"] = 1e-3  # a CPU that has it wrote this run
UNFINISHED = {
    "13c561d": "final names at once; no parts, inputs or head_sha256",
    "c17ab74": "max_shards in the manifest's request",
    "cbf999a": "no plan in part.json",
    "e9511fc": "files in the order of their names",
    "0331473": "order in the manifest",
}
FLAGS = ("--source", "text", "--name", "toy", "--shard-tokens", 600, "--val-tokens", 300)

pytestmark = pytest.mark.fault(34)


@pytest.fixture(scope="session")
def earlier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    for name, where in {"earlier": "", "run_6bad787": "runs/6bad787"}.items():
        with tarfile.open(ROOT / "tests" / "fixtures" / f"{name}.tar.xz") as archive:
            archive.extractall(folder / where, filter="data")
    return folder


@pytest.fixture
def of(earlier, tmp_path, monkeypatch):
    """`of("runs", commit)` copies a fixture and makes it the current folder."""

    def of(kind: str, commit: str) -> Path:
        shutil.copytree(earlier / kind / commit, tmp_path / "here")
        monkeypatch.chdir(tmp_path / "here")
        return tmp_path / "here"

    return of


# -----------------------------------------------------------------------------
# earlier versions


@pytest.mark.parametrize("commit", RUNS)
def test_a_run_goes_on_with_its_very_losses(of, commit, capsys):
    run = of("runs", commit) / "begun"
    before = {stream: values(run, stream) for stream in ("train", "val", "lr", "norm")}
    resume(run, "--dataset-path", "toy")
    printed = capsys.readouterr()
    assert "resumed at step 6" in printed.out
    if commit == "6bad787":
        assert "another model.py" not in printed.err  # its checkpoint has no hash of one
    assert (run / "settings.json").is_file() and not (run / "config.json").exists()
    for stream, expected in before.items():
        assert values(run, stream) == pytest.approx(expected, rel=TOLERANCE.get(commit, 1e-5))
    assert checkpoint.verify(run / "step_000012")["format"] == checkpoint.FORMAT_VERSION


@pytest.mark.parametrize("commit", RUNS)
def test_its_checkpoint_settings_log_and_shards_are_read(of, commit, config, script):
    step = of("runs", commit) / "begun" / "step_000006"
    state = checkpoint.verify(step)
    assert state["step"] == 6 and checkpoint.load_model("begun", "cpu")[1] == "begun/step_000006"
    assert "| step | 6 of 12; 384 tokens seen |" in hub_runs.model_card("org/name", state, has_picture=False)
    assert runs.read_like(dataclasses.replace(config, like="begun"), preset="").seq_len == 16
    assert len(plot.read_log(Path("begun"))["train"]) == 12
    words = script("generate.py", "--model", step, "--prompt", "The sun", "--max-tokens", 4)
    assert words.stdout.startswith("The sun"), words.stderr
    scored = script("perplexity.py", "--model", step, "--data", "toy")
    assert scored.returncode == 0 and "toy" in scored.stdout, scored.stderr
    verified = script("fineweb.py", "--source", "text", "--out-dir", "toy", "--verify")
    assert "shards are as written" in verified.stdout, verified.stderr


def test_the_runs_in_log_are_read(config, tally):
    listed = subprocess.run(
        ["git", "ls-files", "log/*config.json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [(ROOT / line).parent for line in listed.stdout.splitlines()]
    assert len(found) >= 19
    for attempt in tally(len(found), len(found)):
        run = found[attempt.number]
        assert runs.read_like(dataclasses.replace(config, like=str(run)), preset="").seq_len
        assert len(plot.read_log(run)["train"]) > 100


@pytest.mark.parametrize("commit", UNFINISHED)
def test_a_whole_data_set_is_complete(of, commit, script):
    whole = of("data", commit) / "whole"
    again = script("fineweb.py", *FLAGS, "--out-dir", "whole")
    assert "is already complete" in again.stdout, again.stderr
    assert shards.verify(whole)["complete"]
    x, _ = shards.ShardReader(whole, "train", seq_len=16).batch(0, 0, batch_size=2, sequences=4)
    assert x.shape == (2, 16)


@pytest.mark.parametrize("commit", ["cbf999a", "e9511fc", "0331473"])
def test_an_unfinished_data_set_ends_with_the_very_bytes(of, commit, script):
    folder = of("data", commit)
    done = script("fineweb.py", *FLAGS, "--out-dir", "toy")
    assert "part 0: resuming after 3 complete shards" in done.stdout, done.stderr
    assert snapshot(folder / "toy") == snapshot(folder / "whole")


@pytest.mark.parametrize("commit", ["13c561d", "c17ab74"])
def test_an_unfinished_data_set_of_another_form_is_refused(of, commit, script):
    folder = of("data", commit)
    before = snapshot(folder / "toy")
    refused = script("fineweb.py", *FLAGS, "--out-dir", "toy")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "another version of this project began it. Remove the folder to start again" in refused.stderr
    merged = script("fineweb.py", *FLAGS, "--out-dir", "toy", "--merge")
    assert merged.returncode == 2 and merged.stderr.count("\n") == 1
    trained = script("train_gpt2.py", "--dataset-path", "toy")
    assert trained.returncode == 2 and "toy/manifest.json is incomplete" in trained.stderr
    assert snapshot(folder / "toy") == before


# -----------------------------------------------------------------------------
# later versions


@pytest.fixture
def run(config) -> Path:
    """A run of one step, whose checkpoint a test can change."""
    return train(config, max_steps=1)


def test_a_later_checkpoint_is_refused_and_no_earlier_one_is_taken(run, script):
    shutil.copytree(run / "step_000001", run / "step_000002")
    resealed(run / "step_000002", step=2, format=2)
    before = snapshot(run)
    for words in (
        ("train_gpt2.py", "--resume", run),
        ("train_gpt2.py", "--resume", run / "step_000002"),
        ("generate.py", "--model", run, "--prompt", "x"),
    ):
        refused = script(*words)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert (
            "step_000002/state.json: format is 2; this code reads up to 1. A later version" in refused.stderr
        )
        assert refused.stderr.endswith("update this project: git pull\n")
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads_per_group": 2}, "no setting here has the name heads_per_group"),
        ({"optimizer": "lion"}, "the field optimizer is \"lion\"; it must be 'adamw' or 'muon'"),
        ({"seed": [1, 2]}, "the field seed is [1, 2]; it must be a whole number"),
    ],
)
def test_settings_of_a_later_version_are_refused(run, script, settings, message):
    state = checkpoint.verify(run / "step_000001")
    resealed(run / "step_000001", config=state["config"] | settings)
    (run / "settings.json").write_text(json.dumps(state["config"] | settings), encoding="utf-8")
    for flag, file in {"--resume": "step_000001/state.json, config", "--like": "settings.json"}.items():
        refused = script("train_gpt2.py", flag, run)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert f"{run / file}: {message}. If a later version wrote it, update" in refused.stderr


def test_more_entries_files_and_streams_are_read(run, script):
    step = run / "step_000001"
    (step / "ema.bin").write_bytes(b"0")
    digests = checkpoint.verify(step)["files"] | {"ema.bin": files.hash_file(step / "ema.bin")}
    resealed(step, later={"a": [1]}, files=digests)
    log = run / "log.txt"
    lines = log.read_text(encoding="utf-8")
    log.write_text("0 val.mine 3.5\n0 bits_per-byte 1e-05\n" + lines, encoding="utf-8")
    resume(run, "--max-steps", "2")
    assert values(run, "val.mine") == [3.5] and len(values(run)) == 2
    assert "val.mine" in script("plot.py", run, "--text").stdout


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_later_manifest_is_refused(of, script, is_whole):
    folder = of("data", "0331473") / ("whole" if is_whole else "toy")
    change(folder, format=2)
    before = snapshot(folder)
    for words in (
        ("fineweb.py", *FLAGS, "--out-dir", folder),
        ("fineweb.py", *FLAGS, "--out-dir", folder, "--verify"),
        ("fineweb.py", *FLAGS, "--out-dir", folder, "--merge"),
        ("train_gpt2.py", "--dataset-path", folder),
    ):
        refused = script(*words)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert f"{folder}/manifest.json: format is 2; this code reads up to 1. A later" in refused.stderr
        assert refused.stderr.endswith(" later version wrote it: update this project: git pull\n")
    assert snapshot(folder) == before


def test_more_facts_in_a_manifest_are_read_but_no_data_set_goes_on_with_them(of, script):
    folder = of("data", "0331473")
    change(folder / "whole", language="en")
    assert "as written" in script("fineweb.py", *FLAGS, "--out-dir", "whole", "--verify").stdout
    assert "already complete" in script("fineweb.py", *FLAGS, "--out-dir", "whole").stdout
    request = shards.load_manifest(folder / "whole" / "manifest.json")["request"]
    change(folder / "whole", request=request | {"lower_case": True})
    other = script("fineweb.py", *FLAGS, "--out-dir", "whole")
    assert other.returncode == 2 and "another data set (lower_case True, not None)" in other.stderr
    change(folder / "toy", normalization="NFC")  # its tokens may be others
    refused = script("fineweb.py", *FLAGS, "--out-dir", "toy")
    assert refused.returncode == 2 and "toy was begun with another normalization: " in refused.stderr
    assert "another version of this project began it" in refused.stderr


def snapshot(folder: Path) -> dict[str, bytes]:
    """The bytes of all files by their paths, without locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def change(folder: Path, **facts):
    """Changes a manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | facts), encoding="utf-8")
