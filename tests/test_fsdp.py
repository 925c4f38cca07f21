"""Sharded training (--fsdp) and activation checkpointing, in real processes with gloo: that both change where
tensors are and when they are computed, and nothing else."""

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faults
import pytest
import torch
from helpers import ITEM, Training, end_of, flags, lines_of, links, random_model, train, undisturbed, values
from safetensors.torch import load_file

import train_gpt2
from lib import checkpoint, runs
from model import GPT, Block
from train_gpt2 import Config

FSDP = dict(fsdp=True)


@pytest.fixture(scope="session")
def toy(data, tmp_path_factory) -> Config:
    """Ten steps of a model whose 15 channels two processes cannot share evenly, with accumulation."""
    return Config(
        dataset_path=str(data), n_layer=3, n_head=3, n_embd=15, seq_len=16, batch_size=1,
        total_batch_tokens=64, learning_rate=3e-3, warmup_steps=3, max_steps=10, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path_factory.mktemp("log")), run_name="whole",
        val_every=0, val_tokens=500, hellaswag_every=0, sample_every=0, checkpoint_every=5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory) -> Callable[..., Path]:
    return undisturbed(toy, tmp_path_factory)


@pytest.fixture(scope="session")
def busy(toy, tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """`busy(world_size, change=...)` is a run that evaluates in every way: its folder and what it printed."""
    # Three, which two processes cannot share evenly; the words that are right differ in likelihood.
    contexts = ("A man sits on a roof. he", "Words", "The end of the long winter is near. it")
    lines = [json.dumps({**ITEM, "ctx": ctx, "label": n}) for n, ctx in enumerate(contexts)]

    def busy(world_size: int, **changes) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("busy")
        (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        jobs: dict = dict(val_every=5, hellaswag_every=5, sample_every=5)
        cfg = dataclasses.replace(toy, log_dir=str(folder), **jobs, **changes)
        patches = [partial(faults.score_items, folder / "items.jsonl")]
        return folder / "whole", Training(folder, flags(cfg), world_size, patches).finish()

    return busy


# -----------------------------------------------------------------------------
# the same run


def test_losses_are_those_of_whole_copies_and_of_one_process(whole):
    one, ddp, fsdp = whole(1), whole(2), whole(2, **FSDP)
    assert len(values(fsdp)) == 10
    for stream, tolerance in (("train", 1e-5), ("norm", 1e-3)):  # torch's norm of a large tensor on the CPU
        assert values(fsdp, stream) == pytest.approx(values(ddp, stream), rel=tolerance)
        assert values(fsdp, stream) == pytest.approx(values(one, stream), rel=tolerance)


@pytest.mark.parametrize("changes", [{}, FSDP], ids=["whole copies", "sharded"])
@pytest.mark.slow
def test_gradients_exchanged_in_bfloat16_are_rounded_and_no_worse(whole, changes):
    exact, rounded = (values(whole(2, reduce_dtype=dtype, **changes)) for dtype in ("float32", "bfloat16"))
    assert exact != rounded and rounded == pytest.approx(exact, abs=1e-2)


def test_each_process_has_its_share_and_one_block_at_a_time(launch, config, tmp_path):
    launch(config, world_size=2, patches=[partial(faults.note_shards, tmp_path)]).finish()
    (tmp_path / "sharded").mkdir()
    cfg = dataclasses.replace(config, run_name="sharded", fsdp=True)
    launch(cfg, world_size=2, patches=[partial(faults.note_shards, tmp_path / "sharded")]).finish()

    def steps(folder: Path, rank: int) -> list[list[int]]:
        lines = (folder / f"shards{rank}.txt").read_text(encoding="utf-8").splitlines()
        return [[int(word) for word in line.split()] for line in lines]

    copies = steps(tmp_path, 0)
    whole = copies[0][0]
    assert whole > 50304 * 15 and copies == steps(tmp_path, 1)
    assert copies[1:] == [[whole, whole, 2 * whole, 3, 0]] * 9
    both = [steps(tmp_path / "sharded", rank) for rank in (0, 1)]
    assert [len(its) for its in both] == [10, 10]
    for mine, others in zip(*both):
        assert [a + b for a, b in zip(mine[:2], others[:2])] == [whole, whole]
        assert mine[2] == others[2] == 0 or mine[2] + others[2] == 2 * whole
        assert mine[0] == pytest.approx(whole / 2, rel=0.01)
        assert mine[3:] == others[3:] == [1, 2 * 4]  # in both micro-steps: three blocks and the rest


def test_whole_copies_accumulate_gradients_in_the_buckets_that_are_exchanged(launch, config, tmp_path):
    launch(config, world_size=2, patches=[partial(faults.note_gradients, tmp_path)]).finish()
    lines = (tmp_path / "gradients0.txt").read_text(encoding="utf-8").splitlines()
    count, *places = lines[0].split()
    assert lines == [lines[0]] * 10 and int(count) > 30 and len(places) <= 3


def test_a_checkpoint_is_the_same_and_one_process_writes_it(launch, config, whole, tmp_path):
    cfg = dataclasses.replace(config, fsdp=True)
    launch(cfg, world_size=2, patches=[partial(faults.note_saves, tmp_path)]).finish()
    ours, theirs = tmp_path / "run" / "step_000010", whole(2) / "step_000010"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(ours / name), load_file(theirs / name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert tensor.dtype == other[key].dtype and tensor.shape == other[key].shape
            torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=1e-5)
    assert load_file(ours / "model.safetensors")["transformer.wte.weight"].shape == (50257, 15)
    assert isinstance(GPT.from_pretrained(ours), GPT) and checkpoint.verify(ours)["step"] == 10
    tensors = len(load_file(ours / "model.safetensors")) + len(load_file(ours / "optimizer.safetensors"))
    notes = [(tmp_path / f"saves{rank}.txt").read_text(encoding="utf-8").split("\n") for rank in (0, 1)]
    assert notes == [[f"gathered {tensors}", "wrote"] * 2 + [""], ["gathered 0"] * 2 + [""]]


@pytest.mark.parametrize(
    "before, now",
    [((2, False), (2, True)), ((2, True), (2, False)), ((2, True), (1, False)), ((1, False), (2, True))],
    ids=["DDP-FSDP", "FSDP-DDP", "FSDP-one", "one-FSDP"],
)
def test_a_run_goes_on_sharded_or_not(launch, whole, tmp_path, before, now):
    run = tmp_path / "run"
    undisturbed = whole(2, fsdp=True)
    saved = whole(before[0], fsdp=True) if before[1] else whole(before[0])
    links(saved, run, 5)
    word = "--fsdp" if now[1] else "--no-fsdp"
    printed = launch(None, "--resume", str(run), word, world_size=now[0]).finish()
    assert f"--fsdp was {before[1]}, is {now[1]}" in printed and "resumed at step 5" in printed
    assert ("50% of weights" in printed) == now[1]
    assert len(values(run)) == 10
    assert values(run) == pytest.approx(values(undisturbed), rel=1e-5)
    for one, other in ((run, undisturbed), (run, whole(1))):
        tensors = [load_file(folder / "step_000010" / "optimizer.safetensors") for folder in (one, other)]
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[0].items():
            torch.testing.assert_close(tensor, tensors[1][key], rtol=1e-3, atol=1e-5)


def test_a_sharded_run_that_goes_on_by_the_same_command_ends_bit_identical(launch, config, whole):
    cfg = dataclasses.replace(config, fsdp=True, activation_checkpointing=True)
    undisturbed = whole(2, fsdp=True, activation_checkpointing=True)
    run = links(undisturbed, Path(config.log_dir) / "run", 5)
    assert "resumed at step 5" in launch(cfg, "--resume", world_size=2).finish()
    assert end_of(run) == end_of(undisturbed)


def test_a_process_may_have_no_row_of_a_tensor(whole):
    """Biases of four channels: three processes have two, two and none."""
    ddp, fsdp = (whole(3, n_head=1, n_embd=4, total_batch_tokens=96, **how) for how in ({}, FSDP))
    assert values(fsdp) == pytest.approx(values(ddp), rel=1e-5)
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run / "step_000010" / name) for run in (ddp, fsdp))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=1e-5)


def test_one_process_has_all(launch, config, whole):
    printed = launch(dataclasses.replace(config, fsdp=True)).finish()
    assert "100% of weights" in printed
    assert end_of(Path(config.log_dir) / "run") == end_of(whole(1))


# -----------------------------------------------------------------------------
# evaluation, faults, the compiler


@pytest.mark.slow
def test_evaluation_is_that_of_one_process_and_leaves_the_trace_unchanged(busy, whole):
    (one, printed_by_one), (fsdp, printed) = busy(1), busy(2, **FSDP)
    for stream in ("val", "hella"):
        assert len(values(fsdp, stream)) == 3
        assert values(fsdp, stream) == pytest.approx(values(one, stream), rel=1e-5)
    samples = re.findall(r"(?m)^sample \| (.*)", printed)
    assert len(samples) == 1 + 4 + 4 and samples == re.findall(r"(?m)^sample \| (.*)", printed_by_one)
    assert end_of(fsdp) == end_of(whole(2, **FSDP))


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "kind, rank",
    [
        ("gradient", 1),
        ("nan", 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("one nan", 1), ("one inf", 0))),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_all_shards_as_they_are(launch, config, kind, rank):
    poison = faults.poison_an_element if kind.startswith("one") else faults.poison
    patch = partial(poison, kind.removeprefix("one "), rank, 3, 6)
    cfg = dataclasses.replace(config, fsdp=True, checkpoint_every=1, max_steps=8)
    launch(cfg, world_size=2, patches=[patch]).finish()
    run = Path(config.log_dir) / "run"
    assert lines_of(run, "skip") == ["3 skip 1", "6 skip 1"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [(run / f"step_{step:06d}" / name).read_bytes() for step in range(1, 9)]
        assert [step for step in range(1, 8) if files[step - 1] == files[step]] == [3, 6]
    tensors = load_file(run / "step_000008" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.fault(23)
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_overflow_in_one_shard_halves_the_scale_of_all(launch, config, rank):
    """If one process alone halved it, the next step would sum gradients of different scales."""
    cfg = dataclasses.replace(config, fsdp=True, dtype="float16", max_steps=6, checkpoint_every=1)
    launch(cfg, world_size=2, patches=[partial(faults.poison_an_element, "inf", rank, 2)]).finish()
    run = Path(config.log_dir) / "run"
    assert lines_of(run, "skip") == ["2 skip 1"]
    scales = [checkpoint.verify(folder)["scaler"]["scale"] for folder in checkpoint.list_steps(run)]
    assert scales == [2.0**16] * 2 + [2.0**15] * 4
    config = dataclasses.replace(cfg, fsdp=False, run_name="one", device="cpu")
    assert values(train_gpt2.main(config))[:3] == pytest.approx(values(run)[:3], rel=1e-3)


def test_muon_takes_the_same_steps_of_whole_and_of_sharded_matrices(whole):
    """Three layers, so that two processes cannot share a shape's matrices evenly, nor a matrix's 15 rows."""
    one, ddp, fsdp = (whole(n, optimizer="muon", **how) for n, how in ((1, {}), (2, {}), (2, FSDP)))
    for stream, tolerance in (("train", 1e-5), ("norm", 1e-3)):
        assert values(ddp, stream) == pytest.approx(values(one, stream), rel=tolerance)
        assert values(fsdp, stream) == pytest.approx(values(one, stream), rel=tolerance)
    ours, theirs = (load_file(run / "step_000010" / "optimizer.safetensors") for run in (fsdp, one))
    assert ours.keys() == theirs.keys() and sum("momentum_buffer" in name for name in ours) == 12
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-4)


def test_sharded_muon_resumes_with_the_same_end(whole, tmp_path):
    cfg = dict(optimizer="muon", **FSDP)
    run = links(whole(2, **cfg), tmp_path / "run", 5)
    Training(tmp_path, ["--resume", run], 2).finish()
    assert end_of(run) == end_of(whole(2, **cfg))


@pytest.mark.slow
@pytest.mark.fault(29)
def test_without_a_compiler_sharded_training_goes_on_and_says_so(launch, config, whole):
    cfg = dataclasses.replace(config, fsdp=True, compile=True)
    printed = launch(cfg, world_size=2, patches=[faults.hide_compiler]).finish()
    assert "torch.compile does not work here" in printed
    assert end_of(Path(config.log_dir) / "run") == end_of(whole(2, **FSDP))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_have_the_losses_of_eager_ones(launch, config, whole, recompute):
    """Rank 1 has no compiler, and rank 0 goes on with its own."""
    cfg = dataclasses.replace(config, fsdp=True, compile=True, activation_checkpointing=recompute)
    training = launch(cfg, world_size=2, patches=[partial(faults.hide_compiler, 1)])
    assert not any(training.wait(250)), training.printed()
    assert "compiled in" in training.printed(0)
    assert values(Path(config.log_dir) / "run") == pytest.approx(values(whole(2)), rel=1e-4)


# -----------------------------------------------------------------------------
# activation checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_gives_the_same_gradients_from_less_memory(dtype):
    model = random_model(dropout=0.1, n_layer=4).train()
    x = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for model.recompute in (False, True):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept=kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        model.zero_grad()
        torch.manual_seed(1)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((loss, gradients, sum(kept.values())))
    (loss, gradients, kept_bytes), (again, same, less) = found
    assert torch.equal(loss, again) and len(gradients) == len(same) == 52
    assert all(torch.equal(one, other) for one, other in zip(gradients, same))
    assert less < kept_bytes / 3


@pytest.mark.slow
def test_training_with_activation_checkpointing_ends_bit_identical(config, monkeypatch):
    """Dropout and all; each block computes twice in training, and once where it is evaluated."""
    calls, caches = {True: 0, False: 0}, set()
    forward = Block.forward

    def count(block, *args):
        calls[block.training] += 1
        caches.add(torch.is_autocast_cache_enabled())
        return forward(block, *args)

    monkeypatch.setattr(Block, "forward", count)
    cfg = dataclasses.replace(config, dropout=0.2, val_every=10, val_tokens=16)
    kept = train_gpt2.main(cfg)
    assert calls == {True: 3 * 4 * 10, False: 3 * 2} and caches == {True}
    calls.update({True: 0, False: 0})
    caches.clear()
    recomputed = train(cfg, run_name="re", activation_checkpointing=True)
    assert calls == {True: 2 * 3 * 4 * 10, False: 3 * 2}
    assert caches == {False}  # copies of all weights in bfloat16 would be kept as long as the forward pass
    assert end_of(recomputed) == end_of(kept)


@pytest.mark.parametrize("changes", [{}, FSDP], ids=["DDP", "FSDP"])
@pytest.mark.slow
def test_two_processes_with_activation_checkpointing_end_bit_identical(whole, changes):
    runs = [whole(2, dropout=0.2, activation_checkpointing=on, **changes) for on in (False, True)]
    assert end_of(runs[0]) == end_of(runs[1])


def test_dropout_that_cannot_be_drawn_again_is_refused(config):
    with pytest.raises(ValueError, match=r"--dropout is 0.2; on mps --activation-checkpointing cannot"):
        runs.check_settings(dataclasses.replace(config, dropout=0.2, activation_checkpointing=True), 1, "mps")
