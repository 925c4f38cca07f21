"""cli.py and device.py: what command lines share, and choices that depend on the machine alone."""

import dataclasses
import subprocess
import typing
from pathlib import Path

import pytest
import torch
from helpers import ROOT, train

import bench
import fineweb
import generate
import hellaswag
import perplexity
import plot
import train_gpt2
from lib import cli, device, files, tokenizer

PATHS = {
    bench: ["text", "json"], fineweb: ["source", "out_dir"], generate: ["model", "prompt_file", "json"],
    hellaswag: ["model", "data", "json"], perplexity: ["data", "model", "json"], plot: ["out"],
    train_gpt2: ["dataset_path", "init_from", "log_dir", "resume"],
}  # fmt: skip


@pytest.mark.parametrize("script", PATHS, ids=lambda script: script.__name__)
def test_paths_of_every_script_may_begin_with_a_tilde(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hints = typing.get_type_hints(script.Config, include_extras=True)
    assert [name for name, hint in hints.items() if hint == cli.PathName] == PATHS[script]
    required = [f.name for f in dataclasses.fields(script.Config) if f.default is dataclasses.MISSING]
    words = [f"{cli.flag(name)}=~/a b" for name in {*PATHS[script], *required}]
    cfg = cli.parse(script.Config, "", words)
    assert {getattr(cfg, name) for name in PATHS[script]} == {f"{tmp_path}/a b"}


def test_what_is_no_path_keeps_its_tilde():
    cfg = cli.parse(train_gpt2.Config, "", ["--sample-prompt=~/x", "--dataset-path=hf://datasets/a/~b"])
    assert (cfg.sample_prompt, cfg.dataset_path) == ("~/x", "hf://datasets/a/~b")


@pytest.mark.parametrize(
    ("kind", "capabilities", "dtype"),
    [
        ("cpu", {}, torch.float32),
        ("cpu", {"_is_avx512_bf16_supported": True}, torch.bfloat16),
        ("cpu", {"_is_amx_tile_supported": True}, torch.bfloat16),
        ("cpu", {"bf16": True}, torch.bfloat16),  # ARM
        ("mps", {"macos": 14}, torch.bfloat16),
        ("mps", {"macos": 13}, torch.float32),
    ],
)
def test_the_precision_depends_on_the_machine_alone(monkeypatch, kind, capabilities, dtype):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: capabilities.get(name, False))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    macos = capabilities.get("macos", 0)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, _: macos >= major)
    assert device.pick_dtype("auto", torch.device(kind))[0] == dtype


def test_a_step_that_needs_more_memory_than_there_is_is_refused_before_it(config):
    sequences = 2**24  # 17 GB of tokens, 500 GB of activations
    change = dict(batch_size=sequences, total_batch_tokens=sequences * config.seq_len)
    with pytest.raises(
        ValueError, match=r"--batch-size 16777216 takes about [\d.]+ GB.*MemAvailable.*or auto"
    ):
        train(config, **change)
    assert not (Path(config.log_dir) / config.run_name).exists()


def test_a_clone_made_by_git_for_windows_has_the_same_bytes(tmp_path):
    names = ["assets/gpt2.tiktoken", "train.sbatch", "model.py", "log/openstax/log.txt", "play.ipynb"]

    def git(*words: str):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *words], check=True, capture_output=True, text=True)

    for name in (".gitattributes", *names):
        (tmp_path / "ours" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ours" / name).write_bytes((ROOT / name).read_bytes())
    git("init", str(tmp_path / "ours"))
    git("-C", str(tmp_path / "ours"), "add", ".")
    git("-C", str(tmp_path / "ours"), "commit", "-m", "all")
    git("clone", "-c", "core.autocrlf=true", str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert files.hash_file(tmp_path / "theirs" / names[0]) == tokenizer.RANKS_SHA256
    for name in names:
        assert (tmp_path / "theirs" / name).read_bytes() == (ROOT / name).read_bytes(), name
