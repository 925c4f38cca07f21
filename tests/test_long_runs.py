"""Long runs: --max-hours, --eval-only, --batch-size auto, --dry-run."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faults
import pytest
import torch
from helpers import ITEM, end_of, flags, run_script, values

import train_gpt2
from lib import checkpoint, plan, report, run_folder, runs
from lib.device import pick_dtype
from lib.processes import Process
from model import GPT, GPTConfig
from train_gpt2 import Config


@pytest.fixture
def config(toy, tmp_path) -> Config:
    return dataclasses.replace(toy, log_dir=str(tmp_path / "log"), run_name="run")


def names(folder: Path) -> list[str]:
    """Lists all files and folders below a folder, hidden ones, too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns every file's bytes and time of change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def evaluations(printed: str, step: int) -> list[str]:
    """Returns the lines of a step's evaluations; those of samples do not name the step."""
    found, at = [], None
    for line in printed.splitlines():
        at = int(re.split("[ /]+", line)[1]) if line.startswith("step ") else at
        if at == step and re.search(r"validation loss|HellaSwag acc|sample \|", line):
            found.append(line)
    return found


def state_of(run: Path) -> dict:
    return checkpoint.verify(checkpoint.list_steps(run)[-1])


# -----------------------------------------------------------------------------
# --max-hours


@pytest.mark.parametrize("world_size, on_rank", [(1, 0), (2, 0), (2, 1)])
def test_a_run_that_has_had_its_hours_saves_stops_and_goes_on_to_the_same_end(
    launch, config, whole, world_size, on_rank
):
    """One rank's clock suffices."""
    late = partial(faults.two_hours_pass, 6, on_rank)
    training = launch(config, "--max-hours", "1", world_size=world_size, patches=[late])
    assert training.wait() == [4] * world_size, training.printed()
    run, printed = Path(config.log_dir) / "run", training.printed(0)
    assert "stopping: it has run for --max-hours 1\n" in printed and "train_gpt2.py --resume" in printed
    assert [path.name for path in checkpoint.list_steps(run)] == ["step_000004", "step_000007"]

    again = launch(None, "--resume", str(run), world_size=world_size)  # with an hour of its own
    assert again.finish() and f"resumed at step {7}" in again.printed(0) and "note" not in again.printed(0)
    assert end_of(run) == end_of(whole(world_size))


@pytest.mark.fault(35)
@pytest.mark.parametrize("seconds", [-3600, 3600])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_clock_that_jumps_an_hour_changes_nothing(launch, config, whole, world_size, seconds):
    jumps = partial(faults.jump_clock, 5, seconds)
    words = ("--max-hours", "0.5", "--checkpoint-minutes", "10")
    printed = launch(config, *words, world_size=world_size, patches=[jumps]).finish()
    assert "stopping" not in printed and not re.search(r"\dh\d\dm left|years left", printed)
    run = Path(config.log_dir) / "run"
    assert [path.name for path in checkpoint.list_steps(run)] == [f"step_{n:06d}" for n in (4, 8, 12)]
    assert end_of(run) == end_of(whole(world_size))


def test_every_start_makes_a_step_however_short_its_time(launch, config, whole):
    run = Path(config.log_dir) / "run"
    for done in (1, 2, 3):
        assert launch(config, "--resume", "--max-hours", "1e-9").wait() == [4]
        assert state_of(run)["step"] == done
    printed = launch(config, "--resume", "--max-hours", "0").finish()
    assert "note   --max-hours was 1e-09, is 0.0" in printed
    assert end_of(run) == end_of(whole())


@pytest.mark.slow
def test_the_command_that_started_several_processes_has_the_code_of_those(config):
    result = run_script("train_gpt2.py", *flags(config), "--num-gpus", "2", "--max-hours", "1e-9")
    assert result.returncode == 4, result.stderr


# -----------------------------------------------------------------------------
# --eval-only


@pytest.fixture
def hella(tmp_path) -> Callable[[], None]:
    """A patch: three items in place of HellaSwag's."""
    file = tmp_path / "items.jsonl"
    file.write_text(f"{json.dumps(ITEM)}\n" * 3, encoding="utf-8")
    return partial(faults.score_items, file)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_evaluating_alone_finds_what_the_run_found_and_writes_nothing(
    launch, config, hella, tmp_path, world_size
):
    jobs = dict(val_every=4, hellaswag_every=4, sample_every=4)
    cfg = dataclasses.replace(config, **jobs)
    first = launch(cfg, world_size=world_size, patches=[hella]).finish()
    run = Path(cfg.log_dir) / "run"
    before, there = content(tmp_path / "log"), names(tmp_path)

    # The second of three checkpoints; and as a run would, it would keep only one, and move a newer one away.
    evaluating = launch(
        None, "--resume", str(run / "step_000008"), "--eval-only", "--keep-last", "1", "--val-every", "5",
        world_size=world_size, patches=[hella],
    )  # fmt: skip
    printed = evaluating.finish()
    found = evaluations(printed, 8)
    assert found == evaluations(first, 8) and len(found) == 1 + 1 + 4
    assert [line for line in printed.splitlines() if "| " in line] == found  # and no more happens
    assert "nothing is written" in printed
    assert f"step  8/12 | validation loss {values(run, 'val')[2]:.4f}" in printed
    assert content(tmp_path / "log") == before and names(tmp_path) == there


def test_evaluating_alone_takes_weights_from_anywhere(launch, config, whole):
    run = whole(val_every=4)
    before = content(run)
    shape = dict(n_layer=None, n_head=None, n_embd=None)
    cfg = dataclasses.replace(config, **shape, init_from=str(run / "step_000012"), val_every=1000)
    printed = launch(cfg, "--eval-only").finish()
    assert f"step  0/12 | validation loss {values(run, 'val')[-1]:.4f}" in printed
    assert content(run) == before and not Path(config.log_dir).exists()


def test_a_run_on_the_hub_is_not_fetched_where_nothing_is_to_be_written(config):
    for change in (dict(eval_only=True), dict(dry_run=True)):
        with pytest.raises(ValueError, match="--init-from org/name --eval-only"):
            runs.find_checkpoint(dataclasses.replace(config, resume="hf://org/name", **change))


def test_evaluating_alone_minds_no_arithmetic_of_training(config):
    shape = dict(n_layer=None, n_head=None, n_embd=None)
    runs.check_settings(
        dataclasses.replace(config, **shape, eval_only=True, init_from="gpt2", val_every=1), 3
    )
    with pytest.raises(ValueError, match="no multiple"):
        runs.check_settings(config, 3)


def test_a_copy_of_a_run_has_curves_of_its_own(launch, whole, tmp_path):
    ids = []
    for name in ("whole", "copy"):
        run = shutil.copytree(whole(), tmp_path / name)
        ids.append(state_of(run)["tracker_id"])
        launch(None, "--resume", str(run), "--max-steps", str(state_of(run)["step"] + 1)).finish()
        ids.append(state_of(run)["tracker_id"])
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_evaluating_alone_needs_a_model_and_something_to_do(launch, config, whole):
    cfg = dataclasses.replace(config, val_every=4)
    wrong = [
        launch(cfg, "--eval-only"),
        launch(cfg, "--eval-only", "--resume"),  # of a run that has not begun
        launch(None, "--eval-only", "--resume", str(whole())),
    ]
    assert [training.wait() for training in wrong] == [[2]] * 3
    for training, words in zip(wrong, ("--init-from", "--init-from", "--val-every")):
        assert words in training.printed() and "Traceback" not in training.printed()
    assert "--resume" in wrong[0].printed() and not Path(config.log_dir).exists()


# -----------------------------------------------------------------------------
# --batch-size auto


def need(cfg: Config, batch_size: int, world_size: int) -> float:
    """Memory of a process of this toy, in float32: what a checkpoint takes, too."""
    shape = GPTConfig(block_size=cfg.seq_len, n_layer=1, n_head=1, n_embd=4, dropout=cfg.dropout)
    process = Process(0, world_size, torch.device("cpu"))
    work = plan.Workload.from_settings(cfg, GPT(shape), torch.float32, process)
    return sum(work.step_bytes(batch_size).values()) + work.saving_bytes()


def batch_size_of(printed: str) -> int:
    (line,) = [line for line in printed.splitlines() if line.startswith("batch ")]
    return int(line.partition("= ")[2].split()[0])


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_largest_batch_is_found_that_all_processes_have_memory_for(launch, config, whole, world_size):
    cfg = dataclasses.replace(config, total_batch_tokens=16 * 24 * world_size)  # 24 sequences a process
    # The last rank has memory for 7, and a fifth beside that; the others have plenty.
    memory = [1e12] * (world_size - 1) + [world_size * need(cfg, 7, world_size) / 0.8]
    patches = [partial(faults.pretend_memory, *memory)]
    training = launch(cfg, "--batch-size", "auto", world_size=world_size, patches=patches)
    printed = training.finish()
    assert batch_size_of(printed) == 6
    assert "auto, computed: within" in printed and "MemAvailable" in printed
    assert "20% are left alone" in printed
    run = Path(cfg.log_dir) / "run"
    assert state_of(run)["config"]["batch_size"] == 6
    assert json.loads((run / "settings.json").read_text(encoding="utf-8"))["batch_size"] == 6
    same = whole(world_size, total_batch_tokens=cfg.total_batch_tokens, dropout=0.0)
    again = dataclasses.replace(cfg, dropout=0.0, run_name="again")
    launch(again, "--batch-size=auto", world_size=world_size, patches=patches).finish()
    assert values(Path(cfg.log_dir) / "again") == pytest.approx(values(same), abs=1e-4)


def test_where_not_even_one_sequence_fits_the_run_is_refused(launch, config):
    patch = partial(faults.pretend_memory, 1e6)
    training = launch(config, "--batch-size", "auto", patches=[patch])
    assert training.wait() == [2]
    assert "not even one sequence of 16 tokens fits" in training.printed()
    assert not Path(config.log_dir).exists()


def test_a_resumed_run_keeps_the_number_unless_it_is_to_choose_again(launch, config, whole):
    run = shutil.copytree(whole(), Path(config.log_dir) / "run")
    patch = partial(faults.pretend_memory, 1e12)
    for words, batch_size in ((["--batch-size", "auto"], 4), ([], 4), (["--batch-size", "2"], 2)):
        steps = str(state_of(run)["step"] + 1)
        printed = launch(None, "--resume", str(run), "--max-steps", steps, *words, patches=[patch]).finish()
        assert batch_size_of(printed) == batch_size == state_of(run)["config"]["batch_size"]


def test_auto_is_a_batch_size_among_numbers(config):
    assert train_gpt2.read_flags(["--batch-size", "8"]).batch_size == 8
    for words in (["--batch-size", "auto"], ["demo", "--batch-size=auto"], ["gpt2", "--batch-size=auto"]):
        assert train_gpt2.read_flags(words).batch_size == "auto"
    assert train_gpt2.read_flags(["demo"]).batch_size == 4
    with pytest.raises(SystemExit):
        train_gpt2.read_flags(["--batch-size", "large"])
    cfg = dataclasses.replace(config, batch_size="auto", total_batch_tokens=64)
    runs.check_settings(cfg, 4)
    with pytest.raises(ValueError, match=r"no multiple of the 48 tokens.*: --total-batch-tokens 48 or 96$"):
        runs.check_settings(cfg, 3)
    cfg = dataclasses.replace(config, batch_size=3, total_batch_tokens=8 * config.seq_len)
    with pytest.raises(ValueError, match=r"work: --total-batch-tokens 96 or 144, or --batch-size 2 or 4$"):
        runs.check_settings(cfg, 1)


# -----------------------------------------------------------------------------
# --dry-run


def number(printed: str, after: str) -> float:
    return float(printed.partition(after)[2].split()[0].replace(",", ""))


@pytest.fixture
def real(config) -> Config:
    """GPT-2 124M, and a long run of it on the toy data."""
    return dataclasses.replace(config, n_layer=None, n_head=None, n_embd=None, max_steps=1_000_000)


def test_a_dry_run_prints_what_a_run_takes_and_leaves_nothing(launch, real, tmp_path):
    cfg = dataclasses.replace(real, num_gpus=2, dollars_per_gpu_hour=3.0)
    there = names(tmp_path)
    printed = launch(cfg, "--dry-run").finish()
    assert names(tmp_path) == there
    shape = GPTConfig(block_size=16)
    assert f"{shape.num_params:,} parameters" in printed and "x 2 processes x 2 micro-steps" in printed
    windows = (5000 - 1) // 16  # of the toy data
    assert f"steps  1,000,000, 64,000,000 tokens, {64e6 / 16 / windows:.2f} epochs" in printed
    flops = 64e6 * shape.flops_per_token(16)
    assert number(printed, "backward), ") == pytest.approx(flops, rel=0.01)
    assert re.search(r"\ntime   (years|[\dhms]+) on this machine, .* an estimate, 60%", printed)
    assert "\ncost   " in printed and "3.00 per GPU and hour" in printed
    sizes = {name: float(size) for size, name in re.findall(r"\n +([\d.]+) ([a-z]\w+)", printed)}
    assert {"weights", "gradients", "optimizer"} <= set(sizes)
    assert sizes["optimizer"] == pytest.approx(8 * shape.num_params / 1e9, abs=0.006)
    assert sum(sizes.values()) == pytest.approx(number(printed, "memory "), abs=0.04)


def test_a_plan_for_gpus_that_are_not_here_needs_only_their_name(launch, real, tmp_path):
    """On a real model and batch: what fits is the table of docs/scaling.md."""
    cfg = dataclasses.replace(real, batch_size="auto", seq_len=1024, total_batch_tokens=2**20, dtype="auto")
    there = names(tmp_path)
    printed = launch(cfg, "--plan-for", "2xt4", "--dollars-per-gpu-hour", "3").finish()
    assert names(tmp_path) == there and "device 2xt4 (planned, not used), float16" in printed
    assert batch_size_of(printed) == 16 and "x 2 processes" in " ".join(printed.split())
    seconds = 1e6 * 2**20 * GPTConfig().flops_per_token(1024) / (0.4 * 65e12 * 2)
    assert f"time   {report.format_seconds(seconds)} on 2 x T4 at 40% of 65 TFLOP/s" in printed
    assert number(printed, "cost   ") == pytest.approx(3 * 2 * seconds / 3600, abs=0.01)
    printed = " ".join(launch(cfg, "--plan-for", "A100", "--batch-size", "256").finish().split())
    assert "fit; the largest batch within 90% of the 80 GB of A100 is --batch-size 128" in printed
    assert "dollars" not in printed
    large = ("--model-size", "1558M", "--plan-for", "8 x rtx 4090")
    printed = " ".join(launch(cfg, *large).finish().split())
    assert "not even one sequence fits within 90% of the 24 GB of RTX 4090; --batch-size 4 does wi" in printed
    wrong = launch(cfg, "--plan-for", "8xH101")
    assert wrong.wait() == [2] and "'8xH101'; did you mean H100 or" in wrong.printed()
    with pytest.raises(ValueError, match="which --dry-run and --eval-only must not do"):
        train_gpt2.parse_args(["--resume", "hf://org/name", "--plan-for", "H100"])


def test_a_dry_run_of_a_run_that_goes_on_counts_what_is_left(launch, config, whole):
    run = whole()
    before = content(run)
    words = ["--resume", str(run), "--dry-run", "--max-steps", "20"]
    printed = launch(None, *words, world_size=2).finish()
    assert printed.count("steps  8, 512 tokens") == 1 and "note   --max-steps was 12, is 20" in printed
    assert "note   the processes were 1, are 2" in printed
    assert content(run) == before and not list(run.parent.glob(".*"))


def test_a_dry_run_says_what_does_not_fit(launch, real):
    def printed(*words: str, bytes: float) -> str:
        return launch(real, "--dry-run", *words, patches=[partial(faults.pretend_memory, bytes)]).finish()

    assert "this does not fit" not in printed(bytes=1e10)
    assert "this does not fit" in printed(bytes=3e9)
    assert batch_size_of(printed("--batch-size", "auto", bytes=1e10)) == 4
    training = launch(
        real, "--dry-run", "--batch-size", "auto", patches=[partial(faults.pretend_memory, 1e9)]
    )
    assert training.wait() == [2] and "not even one sequence" in training.printed()


@pytest.mark.parametrize("name", ["nowhere", "pydocs"])
def test_a_dry_run_without_data_says_so_and_prints_the_rest(launch, config, tmp_path, name):
    cfg = dataclasses.replace(config, dataset_path=str(tmp_path / name))
    printed = launch(cfg, "--dry-run").finish()
    assert f"the data are not there: {tmp_path / name} holds no shards" in " ".join(printed.split())
    assert "epochs" not in printed and "memory " in printed and "\ntime   " in printed
    assert not (tmp_path / name).exists()


def test_a_dry_run_refuses_what_a_run_refuses(launch, config, data, whole, tmp_path):
    cut, less = tmp_path / "cut", tmp_path / "less"
    for folder in (cut, less):
        shutil.copytree(data, folder)
    shard = sorted(cut.glob("*train*.npy"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    sorted(less.glob("*train*.npy"))[0].unlink()
    run = shutil.copytree(whole(), tmp_path / "log" / "run")
    wrong = {
        "nearest": launch(dataclasses.replace(config, batch_size=3), "--dry-run"),
        f"{run} exists: go on with it": launch(config, "--dry-run"),
        shard.name: launch(config, "--run-name", "new", "--dataset-path", str(cut), "--dry-run"),
        "_train_000000": launch(config, "--run-name", "new", "--dataset-path", str(less), "--dry-run"),
        "--seed was 1337, is 1": launch(None, "--resume", str(run), "--seed", "1", "--dry-run"),
        "--device 'tpu' cannot": launch(config, "--run-name", "new", "--device", "tpu", "--dry-run"),
        "no multiple of the 48 tokens": launch(config, "--run-name", "new", "--num-gpus", "3", "--dry-run"),
    }
    for words, training in wrong.items():
        assert training.wait() == [2], training.printed()
        assert words in training.printed() and "Traceback" not in training.printed()
    taken = run_folder.lock(run)
    training = launch(None, "--resume", str(run), "--dry-run")
    assert training.wait() == [2] and f"{run} is in use by another process" in training.printed()
    run_folder.unlock(taken)
    assert not (tmp_path / "log" / "new").exists()


SMALL = dict(n_layer=4, n_head=6, n_embd=384)
# the precision in which this CPU is fastest; another takes minutes a step
FASTEST = str(pick_dtype("auto", torch.device("cpu"))[0]).removeprefix("torch.")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
@pytest.mark.parametrize(
    ("micro_steps", "changes"),
    [
        (1, dict(SMALL, batch_size=4, seq_len=256, dtype="float32")),  # where Python's own has more weight
        pytest.param(2, dict(batch_size=4, seq_len=256, dtype=FASTEST), marks=pytest.mark.slow),
        pytest.param(1, dict(batch_size=2, seq_len=1024, dtype=FASTEST), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_memory_that_a_dry_run_prints_is_what_a_step_takes(launch, real, tmp_path, changes, micro_steps):
    file, rows = tmp_path / "memory.txt", micro_steps * changes["batch_size"]
    cfg = dataclasses.replace(
        real, **changes, total_batch_tokens=rows * changes["seq_len"], dropout=0.0, max_steps=4,
        checkpoint_every=0,
    )  # fmt: skip
    printed = launch(cfg, "--dry-run").finish()
    patches = [faults.spare_workspaces] if cfg.dtype == "float32" else []
    launch(cfg, patches=[*patches, partial(faults.note_memory, file)]).wait(timeout=400)
    marks = [int(line) for line in file.read_text(encoding="utf-8").split()]
    assert len(marks) == 1 + 4  # before the model, and before each step: the second one has AdamW's state
    assert number(printed, "memory ") == pytest.approx(
        (marks[-1] - marks[0]) / 1e9, rel=0.2 if "n_embd" in changes else 0.15
    )
