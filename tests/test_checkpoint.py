"""checkpoint.py: what is saved comes back, what is damaged is refused by name, nothing stays half-written."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import draw, set_variables
from helpers import ROOT, VOCAB_SIZE, flags, random_model, save_checkpoint

import train_gpt2
from lib import checkpoint, folders, run_folder, tokenizer
from lib.device import pick_device

FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "state.json",
]


def save(run: Path, step: int, files: dict | None = None, **state) -> Path:
    """A checkpoint whose every file but the configurations differs from step to step."""
    model = random_model(seed=step)
    optimizer = {
        "state.wte.exp_avg": torch.full((3, 2), float(step)),
        "state.wte.step": torch.tensor(float(step)),
    }
    files = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"} if files is None else files
    return checkpoint.save(run, step, model.config, model.state_dict(), optimizer, state, files)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with whole checkpoints of the steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trip


def test_weights_optimizer_and_state_come_back_bit_for_bit(tmp_path):
    model = random_model()
    optimizer = {
        "state.a.exp_avg": torch.randn(5, 3),
        "state.a.step": torch.tensor(7.0),
        "state.b.momentum": torch.randn(4).bfloat16(),
        "param_groups.count": torch.tensor([2**40, -1]),
    }
    state = {
        "config": {"learning_rate": 6e-4, "run_name": "größer"},
        "best": 0.1 + 0.2,
        "scaler": {"scale": 65536.0},
        "nothing": None,
    }
    files = {"tokenizer.json": '{"é": 1}', "vocab.txt": "zwei\nZeilen\n"}
    folder = checkpoint.save(tmp_path, 250, model.config, model.state_dict(), optimizer, state, files)
    assert folder == tmp_path / "step_000250"
    loaded = checkpoint.load(folder)
    for got, given in ((loaded.model.state_dict(), model.state_dict()), (loaded.optimizer, optimizer)):
        assert got.keys() == given.keys()
        for name, value in given.items():
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    assert {key: loaded.state[key] for key in state} == state
    assert loaded.state["step"] == 250
    for name, text in files.items():
        assert (folder / name).read_text(encoding="utf-8") == text
    assert sorted([*loaded.state["files"], "state.json"]) == names(folder)


def test_the_files_are_those_of_the_contract(run):
    assert names(run / "step_000002") == sorted(FILES)


def test_transformers_loads_a_checkpoint_as_it_is(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = random_model(vocab_size=VOCAB_SIZE)
    folder = save_checkpoint(tmp_path, model)
    theirs, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        folder, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not set(info["missing_keys"]) - {"lm_head.weight"}
    idx = torch.randint(VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(idx), theirs.eval()(idx).logits, rtol=0, atol=1e-4)
    assert theirs.generation_config.eos_token_id == theirs.generation_config.pad_token_id == 50256

    theirs = AutoTokenizer.from_pretrained(folder)
    text = "Hello,  naïve world!\n\n日本語 🙂 it's 12345"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == theirs("<|endoftext|>")["input_ids"][0] == 50256


# Damage


def assert_refused(run: Path, name: str):
    """Step 2 of the run is refused, by the damaged file's name; step 1 is taken, and it is said why."""
    folder = run / "step_000002"
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        checkpoint.verify(folder)
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        checkpoint.load(folder)
    found, why = checkpoint.find_newest_valid(run)
    assert found and found[0] == run / "step_000001"
    assert len(why) == 1 and str(folder / name) in why[0]


def test_whole_checkpoints_are_accepted_newest_first(run):
    newest = run / "step_000002"
    assert checkpoint.find_newest_valid(run) == ((newest, checkpoint.verify(newest)), [])
    assert checkpoint.verify(run / "step_000001")["step"] == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.fault(4)
def test_a_missing_file_is_refused_by_name(run, name):
    (run / "step_000002" / name).unlink()
    assert_refused(run, name)


@pytest.mark.fault(4)
def test_a_file_cut_at_any_place_is_refused_by_name(run, tally):
    for attempt in tally(14, 200):
        name = FILES[attempt.number % len(FILES)]
        path = run / "step_000002" / name
        data = path.read_bytes()
        os.truncate(path, draw(attempt.number).randrange(len(data)) if attempt.number >= len(FILES) else 0)
        assert_refused(run, name)
        path.write_bytes(data)


@pytest.mark.fault(4)
def test_a_flipped_bit_is_refused_by_name(run, tally):
    sizes = [(run / "step_000002" / name).stat().st_size for name in FILES]
    for attempt in tally(14, 300):  # ten times each file in turn, then by their sizes
        random = draw(attempt.number)
        name = FILES[attempt.number % len(FILES)] if attempt.number < 70 else random.choices(FILES, sizes)[0]
        path = run / "step_000002" / name
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        assert_refused(run, name)
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.fault(4)
def test_a_file_of_another_step_is_refused_by_name(run, name):
    shutil.copy(run / "step_000001" / name, run / "step_000002" / name)
    assert_refused(run, name)


@pytest.mark.fault(4)
def test_a_whole_checkpoint_under_another_steps_name_is_refused(run):
    shutil.rmtree(run / "step_000002")
    shutil.copytree(run / "step_000001", run / "step_000002")
    assert_refused(run, "state.json")


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", "7", '"x"', '{"sha256": "0", "files": {}}', "\0" * 64]
)
@pytest.mark.fault(4)
def test_a_state_that_is_not_a_state_is_refused_by_name(run, content):
    (run / "step_000002" / "state.json").write_text(content, encoding="utf-8")
    assert_refused(run, "state.json")


@pytest.mark.fault(4)
def test_every_single_flipped_bit_of_the_state_is_noticed(run):
    """A flip that keeps the JSON's meaning is found, too: e to E in 6e-05, f to F in \\u00df."""
    path = save(run, 2, config={"learning_rate": 6e-5, "dataset_path": "größer"}) / "state.json"
    data, accepted = path.read_bytes(), []
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                checkpoint.verify(path.parent)
                accepted.append(bytes(flipped[position - 5 : position + 5]))
            except ValueError as error:
                assert "state.json" in str(error)
    assert not accepted


@pytest.mark.fault(4)
def test_with_no_whole_checkpoint_each_is_named(run):
    for step, name in ((1, "config.json"), (2, "model.safetensors")):
        (run / f"step_{step:06d}" / name).unlink()
    found, why = checkpoint.find_newest_valid(run)
    assert found is None
    assert "step_000002/model.safetensors" in why[0] and "step_000001/config.json" in why[1]
    assert checkpoint.find_newest_valid(run / "nothing") == (None, [])


# Only whole directories


def test_what_a_killed_save_left_is_no_checkpoint_and_is_replaced(run):
    shutil.copytree(run / "step_000002", run / ".tmp_step_000003")
    (run / ".tmp_step_000003" / "garbage").write_text("x", encoding="utf-8")
    shutil.copytree(run / "step_000002", run / ".old_step_000004")
    for other in ("step_3", "step_000003.tmp", "log.txt"):
        (run / other).mkdir()
    assert checkpoint.list_steps(run) == [run / "step_000001", run / "step_000002"]
    folder = save(run, 3)
    assert names(folder) == sorted(FILES)
    assert not (run / ".tmp_step_000003").exists()
    assert checkpoint.find_newest_valid(run) == ((folder, checkpoint.verify(folder)), [])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (1_000_000, 999_999, 5):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.list_steps(tmp_path)] == [
        "step_000005",
        "step_999999",
        "step_1000000",
    ]
    newest = tmp_path / "step_1000000"
    assert checkpoint.find_newest_valid(tmp_path) == ((newest, checkpoint.verify(newest)), [])


def test_saving_over_a_step_replaces_all_of_it(run):
    save(run, 2, files={"extra.txt": "old"})
    assert "tokenizer.json" not in names(run / "step_000002")
    save(run, 2, best=1.5)
    assert names(run) == ["step_000001", "step_000002"]
    assert names(run / "step_000002") == sorted(FILES)
    assert checkpoint.verify(run / "step_000002")["best"] == 1.5


@pytest.mark.parametrize(
    "broken", [dict(files={"late.txt": 5}), dict(unserialisable=object())], ids=["a file", "the state"]
)
def test_a_save_that_fails_leaves_nothing_and_harms_nothing(run, broken):
    with pytest.raises(TypeError):
        save(run, 3, **broken)
    assert names(run) == ["step_000001", "step_000002"]
    before = checkpoint.verify(run / "step_000002")
    with pytest.raises(TypeError):
        save(run, 2, **broken)
    assert names(run) == ["step_000001", "step_000002"]
    assert checkpoint.verify(run / "step_000002") == before


def assert_order_of_save(calls: list[tuple[str, str]], folder: Path) -> int:
    """Among the (call, path) each file, and the temporary folder, is flushed after it was last written, then
    comes the rename, and then the run folder is flushed; returns where that is."""
    temporary = folder.with_name(f".tmp_{folder.name}")
    assert calls.count(("rename", str(temporary))) == 1
    rename = calls.index(("rename", str(temporary)))
    before, after = calls[:rename], calls[rename:]
    for path in [*(temporary / name for name in FILES), temporary]:
        assert ("fsync", str(path)) in before, path
        assert ("write", str(path)) not in calls[before.index(("fsync", str(path))) :], path
    return rename + after.index(("fsync", str(folder.parent)))


@pytest.mark.fault(5)
def test_every_file_is_on_disk_before_the_rename_and_the_rename_before_the_end(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor):
        calls.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def noted_rename(source, target, **options):
        calls.append(("rename", str(source)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    assert_order_of_save(calls, save(tmp_path / "run", 1))


@pytest.mark.fault(5)
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace (apt install strace)")
@pytest.mark.slow
def test_the_kernel_sees_the_same_order_in_training_and_only_then_saved_is_said(config, tmp_path):
    trace, run = tmp_path / "trace", tmp_path / "run"
    watched = "trace=fsync,fdatasync,rename,renameat,renameat2,write,pwrite64"
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "60", "-e", watched, "-o", str(trace)]
    cfg = dataclasses.replace(config, max_steps=2, checkpoint_every=1)
    command += [sys.executable, str(ROOT / "train_gpt2.py"), *flags(cfg)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    calls, unfinished = [], {}
    for line in trace.read_text(encoding="utf-8").splitlines():
        thread, _, call = line.partition(" ")
        # A write counts from when it begins, the others from when they have ended.
        if "resumed>" in call:
            call = unfinished.pop(thread, "")
        elif "<unfinished" in call and not re.match(r" *p?write", call):
            unfinished[thread] = call
            continue
        if match := re.search(rf'(sync|rename|write)\w*\(.*?({re.escape(str(run))}[^">]*)', call):
            calls.append((match[1].replace("sync", "fsync"), match[2]))
        elif match := re.search(r"write\(1<.*?\| saved (step_\d+)", call):
            calls.append(("saved", match[1]))
    for folder in checkpoint.list_steps(run):
        assert assert_order_of_save(calls, folder) < calls.index(("saved", folder.name))
    assert [name for call, name in calls if call == "saved"] == ["step_000001", "step_000002"]


# --model


@pytest.fixture
def gpt2_run(tmp_path) -> Path:
    """A run as `run`, of models with GPT-2's vocabulary."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "gpt2_run", random_model(seed=step, vocab_size=VOCAB_SIZE), step)
    return tmp_path / "gpt2_run"


def test_a_model_is_loaded_from_a_checkpoint_or_from_its_run(gpt2_run):
    run = gpt2_run
    for name, folder in ((run / "step_000001", run / "step_000001"), (run, run / "step_000002")):
        model, source = checkpoint.load_model(str(name), "cpu")
        assert source == str(folder)
        assert not model.training
        expected = random_model(seed=int(folder.name[-1]), vocab_size=VOCAB_SIZE)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


def test_a_plain_hugging_face_directory_is_a_model_too(gpt2_run, tmp_path):
    run = gpt2_run
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "plain").mkdir(exist_ok=True)
        shutil.copy(run / "step_000002" / name, tmp_path / "plain" / name)
    model, source = checkpoint.load_model(str(tmp_path / "plain"), "cpu")
    assert source == str(tmp_path / "plain")
    assert torch.equal(model.wte.weight, random_model(seed=2, vocab_size=VOCAB_SIZE).wte.weight)


def test_a_model_of_another_vocabulary_is_refused(run):
    with pytest.raises(ValueError, match="300 tokens; GPT-2's tokenizer has 50257"):
        checkpoint.load_model(str(run), "cpu")


@pytest.mark.fault(4)
def test_a_damaged_checkpoint_is_passed_over_in_a_run_and_refused_by_itself(gpt2_run):
    run = gpt2_run
    os.truncate(run / "step_000002" / "optimizer.safetensors", 9)
    assert checkpoint.load_model(str(run), "cpu")[1] == str(run / "step_000001")
    with pytest.raises(ValueError, match=r"step_000002/optimizer\.safetensors"):
        checkpoint.load_model(str(run / "step_000002"), "cpu")
    os.truncate(run / "step_000001" / "model.safetensors", 9)
    with pytest.raises(
        ValueError, match=r"step_000002/optimizer\.safetensors.*step_000001/model\.safetensors"
    ):
        checkpoint.load_model(str(run), "cpu")


@pytest.mark.parametrize("name", ["no-such-model", "some/where/else"])
def test_a_name_that_is_nothing_is_refused_with_what_could_be_meant(name):
    with pytest.raises(FileNotFoundError, match=f"{name}.*124M.*gpt2-xl.*org/name"):
        checkpoint.load_model(name, "cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        checkpoint.load_model(str(tmp_path), "cpu")


def test_the_newest_run_is_the_one_that_was_started_last_of_those_with_a_checkpoint(tmp_path):
    for name, age in (("b", 300), ("a", 100), ("c", 200)):
        os.utime(save(tmp_path / name, 1), (10**9 - age, 10**9 - age))
    (tmp_path / "without").mkdir()
    assert checkpoint.newest_run(tmp_path) == tmp_path / "a"
    run_folder.write_settings(tmp_path / "c", {"total_batch_tokens": 1})
    run_folder.write_settings(tmp_path / "without", {"total_batch_tokens": 1})
    assert checkpoint.newest_run(tmp_path) == tmp_path / "c"


@pytest.mark.fault(35)
def test_the_run_that_was_started_last_is_the_newest_although_the_clock_was_set_back(tmp_path):
    hour = 3600
    for name, clock in (("first", hour), ("second", 0), ("third", -hour), ("first", -2 * hour)):
        save(tmp_path / name, 1)
        run_folder.write_settings(tmp_path / name, {"total_batch_tokens": 1})
        settings = tmp_path / name / "settings.json"
        if clock > 0:  # it was ahead
            os.utime(settings, (settings.stat().st_mtime + clock,) * 2)
        assert checkpoint.newest_run(tmp_path) == tmp_path / name
    with pytest.raises(FileNotFoundError, match=r"train_gpt2\.py demo"):
        checkpoint.newest_run(tmp_path / "without")


def test_float32_products_stay_float32_whatever_computes_them():
    pick_device("cpu")
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 768, generator=draw), torch.randn(3072, 768, generator=draw)
    exact = x.double() @ w.double().t()
    assert (torch.nn.functional.linear(x, w) - exact).abs().max() < 1e-3  # in bfloat16 it would be 0.3


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--device '{name}'.*give cpu"):
        pick_device(name)


def test_a_model_that_is_not_there_is_said_to_be_neither_here_nor_on_the_hub(launch, tmp_path, monkeypatch):
    (tmp_path / "log").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="'log/nope' is no directory here"):
        checkpoint.load_model("log/nope", "cpu")
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = ("--model", "gpt2", "--device", "cpu", "--prompt", "Once")
    generating = launch(None, *words, script="generate.py", patches=[partial(set_variables, env)])
    assert generating.wait() == [2]
    said = "openai-community/gpt2 is not on this machine, and the Hub cannot be reached"
    assert said in generating.printed()


# What a folder is


def as_model(folder: Path) -> Path:
    """A Hugging Face model's folder, with files of its own."""
    shutil.copytree(
        save_checkpoint(folder.parent.parent / "made", random_model(vocab_size=VOCAB_SIZE)), folder
    )
    for name in ("state.json", "optimizer.safetensors"):
        (folder / name).unlink()
    (folder / "README.md").write_text("theirs", encoding="utf-8")
    return folder


def listing(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STRANGE = {  # folders that no run made, each by a name in it
    "README.md": as_model,
    "config.json": lambda folder: (as_model(folder) / "README.md").unlink(),
    "model_05000.pt": lambda folder: [
        folder.mkdir(),
        (folder / "model_05000.pt").touch(),
        (folder / "log.txt").write_text("0 train 10.9\n", encoding="utf-8"),
    ],
    "thesis.tex": lambda folder: [folder.mkdir(), (folder / "thesis.tex").write_text("years of work")],
}


@pytest.mark.parametrize("name", STRANGE)
def test_nothing_is_written_into_a_folder_that_no_run_made(name, config, tmp_path):
    cfg = dataclasses.replace(config, max_steps=2, checkpoint_every=1, log_dir=str(tmp_path / "log"))
    run, strange = train_gpt2.main(cfg), tmp_path / "log" / "strange"
    STRANGE[name](strange)
    copy = shutil.copytree(run / "step_000002", strange / "step_000002")
    before = listing(tmp_path)
    words = [["--resume", str(copy)], ["--resume", str(copy), "--dry-run"]]
    words += [["--resume", "--run-name", "strange", "--log-dir", str(tmp_path / "log")]]
    for attempt in words:
        with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.") + "|no training"):
            train_gpt2.main(*train_gpt2.parse_args([*attempt, "--max-steps", "3"]))
    with pytest.raises(ValueError, match=r"strange exists|was not made by a run"):
        train_gpt2.main(dataclasses.replace(cfg, run_name="strange"))
    assert listing(tmp_path) == before
    train_gpt2.main(*train_gpt2.parse_args(["--resume", str(copy), "--eval-only", "--sample-every", "1"]))
    assert listing(tmp_path) == before
    assert folders.identify(strange) == "run" or folders.newest_run(tmp_path / "log") == run
    plain = Path(shutil.copytree(copy, tmp_path / "log" / "plain" / "step_000002")).parent  # a copy is a run
    train_gpt2.main(*train_gpt2.parse_args(["--resume", str(plain), "--max-steps", "3"]))
    assert (plain / "step_000003").is_dir()


def test_a_folder_is_what_its_content_says(gpt2_run, tmp_path):
    model = as_model(tmp_path / "step_000100")
    shutil.copytree(gpt2_run / "step_000002", model / "step_000002")
    (tmp_path / "empty").mkdir()
    (tmp_path / "log.txt").write_text("0 train 10.9\n", encoding="utf-8")
    step = gpt2_run / "step_000001"
    kinds = {gpt2_run: "run", step: "checkpoint", model: "model", tmp_path / "empty": "", tmp_path: "run"}
    assert {path: folders.identify(path) for path in kinds} == kinds
    assert checkpoint.load_model(str(model), "cpu")[1] == str(model)  # not the checkpoint in it
    assert folders.find_run(step) == folders.find_run(gpt2_run) == gpt2_run.resolve()
    (step / "state.json").unlink()
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        checkpoint.load_model(str(step), "cpu")
    with pytest.raises(FileNotFoundError, match="no training state"):
        train_gpt2.parse_args(["--resume", str(model)])


@pytest.mark.parametrize("name", ["q (copy)", "-dash", "~tilde", "[a]", "größe", ".hidden"])
def test_a_run_goes_on_whatever_its_folder_is_called(name, config, tmp_path, monkeypatch):
    cfg = dataclasses.replace(config, n_layer=1, max_steps=1, checkpoint_every=1)
    run = train_gpt2.main(cfg).rename(tmp_path / name)
    (run / "config.json").write_text('{"total_ba', encoding="utf-8")  # a run of earlier days was killed here
    monkeypatch.chdir(run)
    assert train_gpt2.main(*train_gpt2.parse_args(["--resume", ".", "--max-steps", "2"])) == run
    monkeypatch.chdir(run / "step_000002")
    for words in (["--resume", "."], ["--resume", "..", f"--run-name={name}"]):
        assert train_gpt2.main(*train_gpt2.parse_args([*words, "--max-steps", "3"])) == run
    assert json.loads((run / "settings.json").read_text(encoding="utf-8"))["run_name"] == name


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_checkpoint_is_readable_by_whom_the_umask_says(mask, tmp_path):
    before = os.umask(mask)
    try:
        folder = save(tmp_path / "run", 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}
