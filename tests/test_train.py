"""train_gpt2.py: the schedule, the optimizers, resuming, many processes, the log, and what it refuses."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import hide_compiler
from helpers import (
    ITEM,
    ROOT,
    end_of,
    flags,
    lines_of,
    resume,
    run_script,
    save_checkpoint,
    scripted_model,
    train,
    values,
    write_shards,
)
from safetensors.torch import load_file

import hellaswag
import train_gpt2
from lib import checkpoint, files, parallel, plan, processes, shard_writer, shards
from lib.hub_shards import open_data
from lib.optimizers import Optimizers
from model import GPT, GPTConfig
from train_gpt2 import Config

# Losses of ten steps of `golden` in float32: they change only when what is computed changes.
GOLDEN = {
    "adamw": [10.8246, 10.8102, 10.7558, 10.6955, 10.6207, 10.5614, 10.5027, 10.4489, 10.4201, 10.3997],
    "muon": [10.8246, 10.8141, 10.7644, 10.7036, 10.6281, 10.5683, 10.5085, 10.4564, 10.4265, 10.4056],
}


@pytest.fixture
def config(golden) -> Config:
    """Ten steps of a model that learns the toy data, in float32, with every job off."""
    return dataclasses.replace(golden, total_batch_tokens=128)


@pytest.fixture
def golden(data, tmp_path) -> Config:
    """The run of the golden losses: it takes seconds."""
    return Config(
        dataset_path=str(data), n_layer=2, n_head=2, n_embd=16, seq_len=32, batch_size=2,
        total_batch_tokens=256, learning_rate=3e-3, warmup_steps=3, max_steps=10, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path), run_name="run",
        val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0,
    )  # fmt: skip


def test_version_says_what_a_report_of_a_fault_needs(script):
    result = script("train_gpt2.py", "--version")
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert result.returncode == 0 and facts.keys() >= {"commit", "system", "cpu", "gpu", "cuda"}
    assert (facts["torch"], facts["numpy"]) == (torch.__version__, np.__version__)


def test_the_learning_rate_warms_up_peaks_and_ends_at_a_tenth():
    cfg = train_gpt2.PRESETS["gpt2"]
    rate = [train_gpt2.get_lr(step, cfg) for step in range(cfg.max_steps + 1)]
    assert rate[0] == pytest.approx(6e-4 / 715)
    assert rate[714] == rate[715] == max(rate) == 6e-4
    assert rate[(715 + 19073) // 2] == pytest.approx((6e-4 + 6e-5) / 2)
    assert rate[-1] == pytest.approx(6e-5)


def test_gpt2_fast_is_gpt2_but_for_the_optimizer_and_four_tenths_of_the_tokens():
    plain, fast = train_gpt2.PRESETS["gpt2"], train_gpt2.PRESETS["gpt2-fast"]
    differing = {
        f.name for f in dataclasses.fields(Config) if getattr(plain, f.name) != getattr(fast, f.name)
    }
    assert differing == {
        *("optimizer", "learning_rate", "max_steps", "warmup_steps"),
        *("schedule", "decay_ratio", "min_lr_ratio", "position_lr_ratio"),
    }
    assert train_gpt2.get_lr(fast.max_steps, fast) == 0 < train_gpt2.get_lr(fast.max_steps - 1, fast)
    assert fast.max_steps / plain.max_steps == pytest.approx(0.4, abs=1e-4)
    assert train_gpt2.read_flags(["gpt2-fast", "--seed", "2"]) == dataclasses.replace(fast, seed=2)


def test_a_wsd_schedule_stays_at_its_peak_and_then_falls_in_a_line():
    cfg = Config(
        schedule="wsd", decay_ratio=0.4, min_lr_ratio=0.1, learning_rate=1.0, warmup_steps=10, max_steps=100
    )
    rate = [train_gpt2.get_lr(step, cfg) for step in range(cfg.max_steps + 1)]
    assert rate[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rate[10:61] == [1.0] * 51
    assert rate[80] == pytest.approx(0.55) and rate[100] == pytest.approx(0.1)
    steepness = {round(a - b, 9) for a, b in zip(rate[60:], rate[61:])}
    assert steepness == {0.0225}


def test_weight_decay_is_for_matrices_and_muon_for_those_inside_the_blocks():
    model = GPT(GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=16))
    names = {p: name for name, p in model.named_parameters()}
    adamw, muon = train_gpt2.make_optimizers(Config(optimizer="muon"), model, torch.bfloat16)
    tokens, positions, plain = adamw.param_groups
    assert [names[p] for p in tokens["params"]] == ["transformer.wte.weight"]
    assert [names[p] for p in positions["params"]] == ["transformer.wpe.weight"]
    assert tokens["weight_decay"] == positions["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.dim() == 1 for p in plain["params"])
    assert {names[p] for p in muon.param_groups[0]["params"]} == {
        name
        for name in names.values()
        if ".h." in name and name.endswith(("attn.weight", "proj.weight", "fc.weight"))
    }
    optimizers = Optimizers(model, [adamw, muon], torch.float32)
    tokens["lr_ratio"], positions["lr_ratio"] = 3.0, 2.0
    optimizers.set_lr(0.1)
    rates = [group["lr"] for member in optimizers.members for group in member.param_groups]
    assert rates == pytest.approx([0.3, 0.2, 0.1, 0.1])
    (alone,) = train_gpt2.make_optimizers(Config(optimizer="adamw"), model, torch.bfloat16)
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)
    decayed = {p for group in alone.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for p in names if p.dim() == 2}
    assert (
        alone.defaults["fused"] and alone.defaults["betas"] == (0.9, 0.95) and alone.defaults["eps"] == 1e-8
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_golden_losses(golden, optimizer):
    run = train(golden, optimizer=optimizer)
    assert values(run) == pytest.approx(GOLDEN[optimizer], abs=2e-3)


def test_four_micro_batches_equal_one_batch(config):
    runs = [train(config, batch_size=size, run_name=f"batch-{size}") for size in (1, 4)]
    assert values(runs[0], "train") == pytest.approx(values(runs[1], "train"), abs=1e-4)


@pytest.mark.slow  # test_faults.py has AdamW in float32
@pytest.mark.fault(10)
@pytest.mark.parametrize("optimizer, dtype", [("muon", "bfloat16"), ("adamw", "float16")])
def test_a_resumed_run_ends_bit_identical(golden, optimizer, dtype):
    """Across the end of the first epoch (156 sequences, 8 a step), with dropout and accumulation; in float16,
    which a CPU computes slowly, also with the gradient scaler's state."""
    cfg = dataclasses.replace(
        golden, optimizer=optimizer, dtype=dtype, dropout=0.2, val_every=3, val_tokens=200,
        checkpoint_every=4, max_steps=24,
    )  # fmt: skip
    whole = train_gpt2.main(cfg)
    part = train(cfg, run_name="part")
    for step in (12, 16, 20, 24):  # as if killed after step 8 was saved and more steps were made
        shutil.rmtree(part / f"step_{step:06d}")
    resumed = resume(part)
    assert resumed == part
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (part / "step_000024" / name).read_bytes() == (whole / "step_000024" / name).read_bytes()
    for stream in ("train", "val", "lr", "norm"):
        assert lines_of(part, stream) == lines_of(whole, stream)


@pytest.fixture
def items(tmp_path, monkeypatch):
    """Two items in place of HellaSwag's."""
    file = tmp_path / "items.jsonl"
    file.write_text(f"{json.dumps(ITEM)}\n{json.dumps(ITEM)}\n", encoding="utf-8")
    monkeypatch.setattr(hellaswag.download, "__defaults__", (hellaswag.URL, file, files.hash_file(file), 1))


@pytest.fixture(scope="module")
def quiet(data, tmp_path_factory) -> tuple[Config, Path]:
    """A run with dropout, and none of the periodic jobs but a checkpoint at the end."""
    cfg = Config(
        dataset_path=str(data), n_layer=1, n_head=1, n_embd=4, seq_len=32, batch_size=2,
        total_batch_tokens=128, learning_rate=3e-3, warmup_steps=3, max_steps=10, device="cpu", dropout=0.2,
        dtype="float32", compile=False, log_dir=str(tmp_path_factory.mktemp("log")), run_name="quiet",
        val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=10,
    )  # fmt: skip
    return cfg, train_gpt2.main(cfg)


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    "jobs",
    [
        dict(val_every=1, hellaswag_every=2, sample_every=3, checkpoint_every=2),
        dict(val_every=3, val_tokens=500),
        dict(hellaswag_every=1),
        dict(sample_every=1),
        *(  # in the campaign
            pytest.param(jobs, marks=pytest.mark.slow)
            for jobs in (
                dict(val_every=1),
                dict(hellaswag_every=4, hellaswag_limit=1),
                dict(sample_every=3, sample_prompt=""),
                dict(checkpoint_every=2),
            )
        ),
    ],
    ids=str,
)
def test_evaluation_and_sampling_leave_the_training_trace_unchanged(quiet, items, jobs, tmp_path):
    cfg, run = quiet
    busy = train(cfg, **{"checkpoint_every": 10, **jobs}, log_dir=str(tmp_path), run_name="busy")
    assert end_of(busy) == end_of(run) and len(lines_of(run)) == 10
    assert len(lines_of(busy, "val")) == {0: 0, 1: 11, 3: 5}[jobs.get("val_every", 0)]
    assert len(lines_of(busy, "hella")) == {0: 0, 1: 11, 2: 6, 4: 4}[jobs.get("hellaswag_every", 0)]


def test_training_lowers_the_validation_loss(config):
    cfg = dataclasses.replace(config, max_steps=60, val_every=60, optimizer="muon", learning_rate=2e-2)
    first, last = values(train_gpt2.main(cfg), "val")
    assert first == pytest.approx(math.log(50257), abs=0.1)
    assert last < first - 3


def test_validation_uses_the_same_tokens_whatever_the_batch(config):
    runs = [
        train(config, max_steps=0, val_every=1, batch_size=size, run_name=f"b{size}") for size in (1, 2, 4)
    ]
    first, *others = (values(run, "val") for run in runs)
    assert others == [pytest.approx(first, abs=1e-5)] * 2


def test_trial_passes_are_those_of_training_also_of_weights_that_were_loaded(golden, monkeypatch):
    """A GPU's memory is tried by them, with dropout and activation checkpointing."""
    modes: list[bool] = []
    monkeypatch.setattr(parallel, "run_pass", lambda module, *args: modes.append(module.training))
    model, process = checkpoint.build_model(golden).eval(), processes.Process(0, 1, torch.device("cuda"))
    batch, cast = (torch.zeros(1, 4, dtype=torch.long),) * 2, torch.autocast("cpu", enabled=False)
    for micro_steps in (1, 5):
        assert parallel.wrap(model.eval(), batch, cast, process, golden, micro_steps) is model
    assert modes == [True] * 3


def test_attention_by_cudnn_is_for_training_only(config, items, monkeypatch):
    """It plans each new shape, and an evaluation has a thousand shapes."""
    seen, hidden = set(), GPT.hidden

    def look(model: GPT, *args):
        seen.add((model.training, torch.backends.cuda.cudnn_sdp_enabled()))
        return hidden(model, *args)

    monkeypatch.setattr(GPT, "hidden", look)
    train(config, val_every=5, hellaswag_every=5, sample_every=5, checkpoint_every=10)
    assert seen == {(True, True), (False, False)}
    seen.clear()
    shape = dict(n_layer=None, n_head=None, n_embd=None)
    train(config, **shape, init_from=str(Path(config.log_dir) / "run"), run_name="tuned", val_every=5)
    assert seen == {(True, True), (False, False)}
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # nor for scripts that only evaluate


def test_a_batch_that_runs_out_of_gpu_memory_is_refused_before_the_first_step(golden, monkeypatch):
    """No GPU runs out here: the network says so for more than two rows, at the peak of a real trial pass."""
    forward, alive = GPT.forward, []

    def run_out(model: GPT, idx: torch.Tensor, *args):
        loss = forward(model, idx, *args)
        if len(idx) > 2:
            alive.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    def fitting_batch(work, model, device, below, has_optimizer_state) -> tuple[int, str]:
        assert alive and alive[0]() is None  # the failed pass holds no memory any more
        assert (below, has_optimizer_state) == (4, False)
        return 2, "tried"

    monkeypatch.setattr(GPT, "forward", run_out)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(plan.Workload, "fitting_batch", fitting_batch)
    cfg = dataclasses.replace(golden, batch_size=4, compile=True)
    with pytest.raises(ValueError, match=r"--batch-size 4 .* 2 fits \(tried\): give --batch-size 2, or auto"):
        train_gpt2.main(cfg)
    assert not (Path(golden.log_dir) / "run").exists()
    assert train_gpt2.main(dataclasses.replace(cfg, batch_size=2, max_steps=1)).exists()


def test_two_processes_equal_one(config, tmp_path):
    """A real torch elastic launch with gloo, by the --num-gpus shortcut."""
    cfg = dataclasses.replace(config, optimizer="muon", val_every=5, checkpoint_every=5)
    one = train_gpt2.main(cfg)
    result = run_script("train_gpt2.py", *flags(dataclasses.replace(cfg, run_name="two", num_gpus=2)))
    assert result.returncode == 0, result.stderr
    two = tmp_path / "two"
    assert values(two) == pytest.approx(values(one), abs=1e-4)
    assert values(two, "val") == pytest.approx(values(one, "val"), abs=1e-4)
    ours, theirs = (load_file(run / "step_000010" / "model.safetensors") for run in (one, two))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=0)
    assert result.stdout.count("Done.") == 1  # only rank 0 speaks


def test_processes_that_share_a_validation_find_exactly_what_one_finds(config, monkeypatch):
    monkeypatch.setattr(train_gpt2, "VAL_BATCH_TOKENS", 4 * config.seq_len)
    reader = shards.ShardReader(shards.Folder(Path(config.dataset_path)), "val", config.seq_len)
    model = checkpoint.build_model(config).eval()
    assert (
        24 < reader.num_windows < 32 and reader.num_windows % 4
    )  # batches for seven, the last a smaller one

    def totals(world_size: int) -> list[float]:
        found = []
        for rank in range(world_size):
            process = processes.Process(rank, world_size, torch.device("cpu"))
            with monkeypatch.context() as patch:
                patch.setattr(
                    processes.Process, "all_reduce", lambda self, *values: found.append(values[0]) or values
                )
                train_gpt2.validation_loss(model, reader, config.val_tokens, process)
        return found

    (one,) = totals(1)
    for world_size in (2, 3, 7):
        shared = totals(world_size)
        assert min(shared) > 0 and sum(shared) == one


def test_a_picture_that_cannot_be_drawn_is_said(config, capsys, pictures):
    cfg = dataclasses.replace(config, val_every=2, checkpoint_every=2, max_steps=2)
    picture = train_gpt2.main(cfg) / "loss.png"
    picture.unlink()
    picture.mkdir()
    train_gpt2.main(dataclasses.replace(cfg, max_steps=4, resume="newest"))
    assert "plot.py failed: plot.py: " in capsys.readouterr().out


def test_the_run_folder_holds_what_the_contract_says(config, capsys, pictures):
    cfg = dataclasses.replace(config, val_every=5, checkpoint_every=5, max_steps=5)
    run = train_gpt2.main(cfg)
    assert {p.name for p in run.iterdir()} == {"log.txt", "settings.json", "loss.png", "step_000005"}
    assert f"The curves are in {run / 'loss.png'}." in capsys.readouterr().out
    assert json.loads((run / "settings.json").read_text())["learning_rate"] == cfg.learning_rate
    state = checkpoint.verify(run / "step_000005")
    assert state["step"] == 5 and state["data"] == shards.Folder(Path(cfg.dataset_path)).fingerprint()
    assert {"config", "dtype", "scaler", "best_val_loss", "model_py", "versions"} <= set(state)
    assert [len(values(run, s)) for s in ("train", "lr", "norm", "toks", "val")] == [5, 5, 5, 5, 2]


def test_padding_rows_are_not_saved_and_stay_zero(config):
    run = train(config, checkpoint_every=10, optimizer="muon")
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_file(run / "step_000010" / name)
        rows = {tensor.size(0) for key, tensor in tensors.items() if "wte" in key and tensor.dim() == 2}
        assert rows == {50257}


def test_a_run_folder_is_never_overwritten(config):
    train(config, max_steps=1)
    with pytest.raises(ValueError, match=r"run exists: go on with it \(--run-name run --resume"):
        train(config, max_steps=1)


def test_the_default_run_name_says_model_and_time(config):
    run = train(config, run_name="", max_steps=0)
    assert run.name.startswith("gpt2-1M_20") and len(run.name) == len("gpt2-1M_2026-11-21_10-30-00")


def test_fine_tuning_starts_where_the_checkpoint_ended(config):
    run = train(config, val_every=10, checkpoint_every=10)
    shape = dict(n_layer=None, n_head=None, n_embd=None)
    tuned = train(config, **shape, init_from=str(run), run_name="tuned", max_steps=0, val_every=1)
    assert values(tuned, "val")[0] == values(run, "val")[-1]


def test_weights_replace_the_shape_of_a_preset_but_not_what_was_typed(config, tmp_path, capsys, monkeypatch):
    run = train(config, checkpoint_every=1, max_steps=1)
    cfg = train_gpt2.read_flags(["demo", "--init-from", str(run)])
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len) == (None, None, None, config.seq_len)
    assert cfg.learning_rate == train_gpt2.PRESETS["demo"].learning_rate
    words = ["finetune", "--init-from", str(run), "--dataset-path", config.dataset_path, "--max-steps", "0"]
    words += [
        "--total-batch-tokens",
        str(8 * config.seq_len),
        "--log-dir",
        str(tmp_path),
        "--run-name",
        "tuned",
    ]
    words += ["--no-compile", "--device", "cpu", "--sample-every", "0"]
    train_gpt2.main(*train_gpt2.parse_args(words))
    assert f"note   --seq-len is {config.seq_len}, the context of {run}" in capsys.readouterr().out
    typed = train_gpt2.read_flags([*words, "--n-layer", "3", "--model-size", "350M"])
    with pytest.raises(ValueError, match=r"brings its own shape: leave out --model-size, --n-layer$"):
        train_gpt2.main(dataclasses.replace(typed, run_name="other"))
    assert train_gpt2.read_flags([*words, "--seq-len", "999"]).seq_len == 999
    # A wrong path is said before data that are not there either.
    with pytest.raises(FileNotFoundError, match=rf"--init-from .*rum' is no directory.*did you mean {run}\?"):
        train_gpt2.main(dataclasses.replace(cfg, init_from=f"{tmp_path}/rum", dataset_path="nowhere"))


@pytest.mark.fault(13)
def test_resume_refuses_other_settings_unless_told(config):
    cfg = dataclasses.replace(config, checkpoint_every=5, max_steps=5)
    run = train_gpt2.main(cfg)
    with pytest.raises(ValueError, match=r"--learning-rate was 0.003, is 0.1.*--override"):
        resume(run, "--learning-rate", "0.1")
    args = ["--resume", str(run), "--learning-rate", "0.1", "--override", "--max-steps", "6"]
    train_gpt2.main(*train_gpt2.parse_args(args))
    assert len(values(run)) == 6


def test_resume_finds_the_newest_run_a_named_run_or_starts_one(config, tmp_path):
    for name in ("older", "newer"):
        train(config, run_name=name, checkpoint_every=1, max_steps=1)
    log = ["--log-dir", str(tmp_path)]
    assert Path(train_gpt2.parse_args(["--resume", *log])[0].resume) == tmp_path / "newer" / "step_000001"
    named, _ = train_gpt2.parse_args(["--resume", *log, "--run-name", "older"])
    assert (
        Path(named.resume) == tmp_path / "older" / "step_000001"
        and named.learning_rate == config.learning_rate
    )
    unborn, _ = train_gpt2.parse_args(["--resume", *log, "--run-name", "unborn", *flags(config)])
    unborn = dataclasses.replace(unborn, run_name="unborn", max_steps=0)
    assert train_gpt2.main(unborn) == train_gpt2.main(unborn)  # it may begin, and begin again
    with pytest.raises(FileNotFoundError, match=r"no folder[^;]*; give[^;]*$"):
        train_gpt2.parse_args(["--resume", str(tmp_path / "zzz")])
    with pytest.raises(FileNotFoundError, match=r"no folder.*; did you mean .*/older\?"):
        train_gpt2.parse_args(["--resume", "oldre", *log])
    for missing in ("step_000999", "step_9"):
        with pytest.raises(FileNotFoundError, match=r"older has step_000001$"):
            train_gpt2.parse_args(["--resume", str(tmp_path / "older" / missing)])
        with pytest.raises(FileNotFoundError, match=r"--model .*older has step_000001$"):
            checkpoint.load_model(str(tmp_path / "older" / missing), "cpu")


ABOVE_0 = [
    "seq_len", "batch_size", "total_batch_tokens", "learning_rate", "num_gpus", "val_tokens", "cache_gb",
    "max_bad_steps", "timeout_seconds",
]  # fmt: skip
FROM_0 = [
    "val_every", "hellaswag_every", "sample_every", "checkpoint_every", "max_steps", "warmup_steps",
    "weight_decay", "grad_clip", "hellaswag_limit", "seed", "checkpoint_minutes", "keep_last", "keep_every",
    "max_hours", "dollars_per_gpu_hour",
]  # fmt: skip
REAL = ["learning_rate", "cache_gb", "timeout_seconds", "weight_decay", "grad_clip", "checkpoint_minutes"]
NONSENSE = [
    *((name, value) for name in ABOVE_0 for value in (0, -1)),
    *((name, -1) for name in FROM_0),
    *((name, math.nan) for name in (*REAL, "min_lr_ratio")),
    ("min_lr_ratio", -0.1), ("weight_decay", math.inf), ("learning_rate", -math.inf),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"total_batch_tokens": 1000}, ["1000", "64", "960 or 1024"]),
        ({"batch_size": 0}, ["--batch-size is 0", "above 0"]),
        ({"learning_rate": -1.0}, ["--learning-rate is -1.0"]),
        ({"learning_rate": math.nan}, ["--learning-rate is nan"]),
        ({"learning_rate": math.inf}, ["--learning-rate is inf"]),
        ({"max_steps": -1}, ["--max-steps is -1"]),
        ({"val_every": -5}, ["--val-every is -5"]),
        ({"min_lr_ratio": 2.0}, ["--min-lr-ratio is 2.0"]),
        ({"n_head": 3}, ["n_embd is 16", "3 heads", "15 or 18"]),
        ({"dropout": 1.0}, ["dropout is 1.0"]),
        ({"model_size": "7B"}, ["'7B'", "124M"]),
        ({"seq_len": 256, "total_batch_tokens": 512, "val_every": 1}, []),
        ({"run_name": "../away"}, ["'../away'"]),
        ({"device": "tpu"}, ["'tpu'", "cpu"]),
        ({"dataset_path": "nowhere"}, ["nowhere", "python fineweb.py", "train_gpt2.py demo"]),
        *(({name: value}, [f"--{name.replace('_', '-')} is {value}"]) for name, value in NONSENSE),
        *(({name: 0}, [f"{name} is 0"]) for name in ("n_layer", "n_head", "n_embd")),
    ],
)
@pytest.mark.fault(12)
def test_bad_values_are_refused_before_the_first_step(config, tmp_path, change, words):
    cfg = dataclasses.replace(config, **change)
    if not words:  # a good neighbour of the bad ones: the same path must also accept
        train(cfg, max_steps=0)
        return
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train_gpt2.main(cfg)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not list(tmp_path.glob("*/log.txt"))


def test_the_command_line(config, launch):
    demo = train_gpt2.read_flags(["demo", "--max-steps", "7", "--learning_rate=1"])
    assert (demo.max_steps, demo.learning_rate, demo.n_layer) == (7, 1.0, 6)
    assert train_gpt2.read_flags([]) == Config()
    wrong = [
        launch(None, "demo", "--bogus", "3"),
        launch(dataclasses.replace(config, batch_size=3)),
        launch(config, "--learning-rate", "nan"),
    ]
    assert [training.wait() for training in wrong] == [[2], [2], [2]]
    for training, words in zip(wrong, ("--bogus", "nearest", "--learning-rate is nan")):
        assert words in training.printed() and "Traceback" not in training.printed()


@pytest.mark.slow
@pytest.mark.fault(29)
def test_without_a_compiler_training_goes_on_and_says_so(config, launch):
    training = launch(dataclasses.replace(config, compile=True, run_name="compiled"), patches=[hide_compiler])
    assert "torch.compile does not work here" in training.finish() and "Done." in training.printed()
    assert values(Path(config.log_dir) / "compiled") == values(train_gpt2.main(config))


@pytest.mark.slow
def test_compiled_training_has_the_losses_of_eager_training(config):
    eager = train_gpt2.main(config)
    compiled = train(config, compile=True, run_name="compiled")
    assert values(compiled) == pytest.approx(values(eager), abs=1e-3)


def test_importing_a_script_does_nothing(tmp_path):
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
    code += "".join(f"import {name}\n" for name in names)
    code += "heavy = {'datasets', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_hellaswag_is_scored_in_the_loop(config, items):
    run = train(config, hellaswag_every=2, max_steps=4, checkpoint_every=4)
    model, _ = checkpoint.load_model(str(run), "cpu")
    assert len(lines_of(run, "hella")) == 3
    assert values(run, "hella")[-1] == hellaswag.evaluate(model, [ITEM, ITEM])["completion"]["acc_norm"]


def test_training_goes_on_without_hellaswag_where_it_cannot_be_had(config, tmp_path, monkeypatch, capsys):
    nowhere = ("http://127.0.0.1:9/hellaswag_val.jsonl", tmp_path / "none.jsonl", hellaswag.SHA256, 1)
    monkeypatch.setattr(hellaswag.download, "__defaults__", nowhere)
    run = train(config, hellaswag_every=1, max_steps=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "HellaSwag" in line]
    assert line.startswith("note   HellaSwag is left out") and nowhere[0] in line and "--data" in line
    assert len(lines_of(run)) == 1 and not lines_of(run, "hella")


def test_four_samples_begin_with_the_prompt_but_one_at_step_0(config, capsys):
    train(config, sample_every=1, max_steps=1, sample_prompt="Once")
    samples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample")]
    assert len(samples) == 5 and all(line.startswith("sample | 'Once") for line in samples)
    assert len(samples[0]) < min(map(len, samples[1:]))


@pytest.mark.slow  # it reads the docstrings of all packages
def test_an_interrupted_preparation_of_the_demo_is_made_again(tmp_path):
    folder = tmp_path / "pydocs"
    shard_writer.begin(folder, {"name": "pydocs", "parts": 1, "request": {}})  # and no more
    process = processes.Process(0, 1, torch.device("cpu"))
    assert open_data(str(folder), 1e9, process, may_make=True).folder == folder
    assert shards.read_manifest(folder)


@pytest.mark.fault(12)
def test_a_context_longer_than_the_position_table_is_refused_before_the_first_step(config, tmp_path):
    folder = save_checkpoint(tmp_path / "small", scripted_model([1, 2, 3], block_size=16))
    cfg = dataclasses.replace(config, n_layer=None, n_head=None, n_embd=None, init_from=str(folder))
    with pytest.raises(ValueError, match=r"--seq-len 32 is longer than the 16 of .*step_000001"):
        train_gpt2.main(cfg)
    assert not list(tmp_path.glob("run*"))
    train(cfg, seq_len=16, max_steps=1)


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "change", ["another token", "another order", "one shard less", "another vocabulary", "another tokenizer"]
)
def test_resume_refuses_data_that_have_changed(config, data, tmp_path, change):
    ids = np.concatenate([np.load(path) for path in sorted(data.glob("*.npy"))])
    folder, sizes = tmp_path / "data", dict(shard_tokens=1500, val_tokens=1000)
    write_shards(folder, ids, **sizes)
    cfg = dataclasses.replace(config, dataset_path=str(folder), checkpoint_every=1, max_steps=2)
    run = train_gpt2.main(cfg)
    shutil.rmtree(run / "step_000002")
    shutil.rmtree(folder)
    if change == "another token":
        ids[3000] = (ids[3000] + 1) % 97
    elif change == "another order":
        ids = ids[::-1]
    elif change == "one shard less":
        ids = ids[:-1500]
    elif change == "another vocabulary":  # the same text with other ids
        ids = 50_000 - ids
    manifest = write_shards(folder, np.ascontiguousarray(ids), **sizes)
    if change == "another tokenizer":
        manifest["tokenizer"] = {"name": "gpt2", "sha256": "0" * 64}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValueError, match=r"step_000001 is of another run: the shards in .* are not those"):
        resume(run)
    resume(run, "--override")
    assert len(values(run)) == 2


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "flag, value, old",
    [
        ("--seq-len", "16", "32"),
        ("--dropout", "0.1", "0.2"),
        ("--total-batch-tokens", "256", "128"),
        ("--weight-decay", "0.0", "0.1"),
        ("--grad-clip", "2.0", "1.0"),
        ("--seed", "1", "1337"),
        ("--dtype", "bfloat16", "'float32'"),
        ("--min-lr-ratio", "0.5", "0.1"),
        ("--warmup-steps", "4", "3"),
    ],
)
def test_resume_refuses_other_settings_and_prints_both(quiet, flag, value, old):
    before = sorted(path.name for path in quiet[1].iterdir()), (quiet[1] / "log.txt").read_bytes()
    new = repr(value) if value.isalpha() or value == "bfloat16" else value
    with pytest.raises(ValueError, match=rf"{flag} was {old}, is {new}.*To go on all the same: --override"):
        resume(quiet[1], flag, value)
    assert before == (sorted(path.name for path in quiet[1].iterdir()), (quiet[1] / "log.txt").read_bytes())


@pytest.mark.fault(13)
@pytest.mark.parametrize("words", [("--n-embd", "8"), ("--optimizer", "muon"), ("--model-size", "350M")])
def test_a_change_that_the_checkpoint_cannot_fit_is_refused_even_with_override(quiet, words):
    with pytest.raises(ValueError, match=rf"cannot change: {words[0]} was .*start a new run"):
        resume(quiet[1], *words, "--override")


def test_a_run_is_resumed_under_its_own_name_only(quiet):
    with pytest.raises(ValueError, match=r"--run-name is 'other', but .* is of the run 'quiet'"):
        train_gpt2.parse_args(["--resume", str(quiet[1]), "--run-name", "other"])


def test_a_flag_of_the_first_command_may_be_repeated_at_resume(config):
    run = train(config, skip_spikes=True, checkpoint_every=10)
    assert train_gpt2.parse_args(["--resume", str(run), "--skip-spikes"])[0].skip_spikes


def test_a_configuration_built_in_python_resumes_as_the_command_line_does(config):
    cfg = dataclasses.replace(config, checkpoint_every=5)
    train_gpt2.main(cfg)
    for source in ("newest", str(Path(cfg.log_dir) / "run")):
        before = lines_of(Path(cfg.log_dir) / "run")
        max_steps = len(before) + 2
        run = train(cfg, resume=source, max_steps=max_steps)
        after = lines_of(run)
        assert after[: len(before)] == before and len(after) == max_steps


@pytest.mark.fault(12)
def test_weights_of_another_shape_than_init_from_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"leave out --n-layer, --n-head, --n-embd$"):
        train(config, init_from="gpt2")


@pytest.mark.slow
def test_two_compiled_processes_have_the_losses_of_one(config, tmp_path):
    one = train_gpt2.main(config)
    cfg = dataclasses.replace(config, run_name="two", num_gpus=2, compile=True)
    result = run_script("train_gpt2.py", *flags(cfg), "--compile")
    assert result.returncode == 0, result.stderr
    assert values(tmp_path / "two", "train") == pytest.approx(values(one), abs=1e-3)
