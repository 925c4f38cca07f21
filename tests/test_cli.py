"""cli.py and device.py: what command lines share, and choices that depend on the machine alone."""

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_on_terminal, train

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
    train_gpt2: ["dataset_path", "init_from", "like", "log_dir", "resume"],
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


def help_of(script, capsys, monkeypatch, columns: int, *words: str) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py"])
    with pytest.raises(SystemExit) as end:
        if script is train_gpt2:
            train_gpt2.read_flags([*words, "--help"])
        cli.parse(script.Config, script.__doc__, ["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("script", PATHS, ids=lambda script: script.__name__)
def test_help_fits_the_terminal_and_has_each_flag_once_with_its_default(script, columns, capsys, monkeypatch):
    lines = help_of(script, capsys, monkeypatch, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[2] in script.__doc__ and "Examples" in lines[-25:] and "\x1b" not in "".join(lines)
    rows = [line.split()[0].rstrip(",").replace("[no-]", "") for line in lines if re.match(r"  [-A-Z]", line)]
    fields = dataclasses.fields(script.Config)
    names = ["RUNS" if f.name == "runs" else cli.flag(f.name) for f in fields]
    assert sorted(rows) == sorted(names)
    wrong = [f.metadata["help"] for f in fields if re.match(r"[A-Z][a-z]|.*\.$", f.metadata["help"])]
    assert not [text for text in wrong if not text.startswith("HellaSwag")]  # one form in all scripts
    text = re.sub(r"\s+", " ", " ".join(lines))
    for field in fields:
        if type(field.default) in (int, float) or field.default == "auto":
            assert f"default {str(field.default).removesuffix('.0')})" in text, field.name
        assert not field.name.endswith("_every") or "; 0 for n" in field.metadata["help"]


def test_help_of_training_is_short_begins_with_what_is_most_used_and_knows_the_preset(capsys, monkeypatch):
    text = help_of(train_gpt2, capsys, monkeypatch, 120, "demo")
    assert len(text.splitlines()) < 100
    headings = [
        "Most used",
        "Data",
        "Model",
        "Optimization",
        "Machine",
        "Run",
        "Periodic jobs: every",
        "Numerical",
    ]
    places = [text.index(f"\n\n{heading}") for heading in [*headings, "On disk", "Examples\n"]]
    assert places == sorted(places) and text[places[0] : places[1]].count("\n  --") == 10
    assert re.search(r"--seq-len INT .*\(default 256\)", text) and "--learning-rate, --lr NUMBER" in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminal")
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_headings_are_bold_on_a_terminal_that_may_have_colours(env):
    printed = run_on_terminal(72, sys.executable, str(ROOT / "plot.py"), "--help", **env)
    assert ("\x1b[1mFlags\x1b[0m" in printed) == ("NO_COLOR" not in env)
    lines = re.sub(r"\x1b\[\d*m", "", printed).splitlines()
    assert 60 < max(map(len, lines)) <= 72


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demoo", "'demoo' is no preset; there are gpt2, gpt2-fast, demo, finetune; did you mean demo?"),
        ("--seed 1 demo", "the preset demo must be the first word"),
        ("--lernin_rate 3", "no flag --lernin_rate; did you mean --learning-rate"),
        ("--preset demo", "the preset is the first word"),
        ("--gpu 0", "write --device cuda:0"),
        ("--gpus=2", "write --num-gpus"),
        ("--epochs 3", "write --max-steps (--dry-run"),
        ("--dataset x", "write --dataset-path data/NAME"),
        ("--fsdp=False", "--no-NAME off; no switch takes a value, as 'False'"),
        ("--zzz", "no flag --zzz; --help lists the flags"),
    ],
)
def test_a_wrong_word_is_answered_with_what_to_write(words, said):
    with pytest.raises(ValueError) as error:
        train_gpt2.read_flags(words.split())
    assert said in str(error.value) and str(error.value).count("--dataset-path") == ("dataset" in words)
    assert train_gpt2.read_flags(["--lr", "1"]).learning_rate == 1


def test_a_script_suggests_only_flags_that_it_has():
    with pytest.raises(ValueError, match=r"--max_new_tokens; write --max-tokens$"):
        cli.parse(generate.Config, "", ["--max_new_tokens=3"])
    with pytest.raises(ValueError, match=r"no flag --epochs; --help lists"):
        cli.parse(generate.Config, "", ["--epochs", "3"])
    flags = {cli.flag(f.name) for script in PATHS for f in dataclasses.fields(script.Config)}
    advised = {re.split("[ ,]", text)[0] for value in cli.NAMES_HERE.values() for text in value.split(" | ")}
    assert advised <= flags


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


def test_a_switch_may_be_left_to_the_script():
    words = {"": None, "--compile": True, "--no-compile": False, "--no_compile": False}
    assert {w: train_gpt2.read_flags([w] if w else []).compile for w in words} == words
