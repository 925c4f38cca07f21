"""lib/console.py, cli.run and report: what happens when the screen, the reader or the terminal is gone."""

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import faults
import pytest
from helpers import ROOT, flags, random_model, run_on_terminal, save_checkpoint, train

from lib import checkpoint, cli, console, report
from lib.stops import Signals

ITEM = dict(
    **dict(activity_label="Sitting", ctx_a="A man sits.", ctx_b="he", ctx="A man sits. he", label=1),
    **dict(ind=0, endings=["eats.", "reads.", "sings.", "sleeps."]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run"), random_model(vocab_size=50257, n_layer=1))


@pytest.fixture
def one_item(tmp_path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM) + "\n", encoding="utf-8")
    return path


def sh(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell's command in which {python} and {root} stand for ours; bash, for PIPESTATUS."""
    command = command.replace("{python}", shlex.quote(sys.executable)).replace(
        "{root}", shlex.quote(str(ROOT))
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, encoding="utf-8", env=env, timeout=120
    )


def lose_streams(how: str):
    """In a training's process: its standard output and error cannot be written from the first step on."""
    if how == "closed before":
        os.close(1)
        sys.stdout = sys.stderr = None  # as Python does if they are closed when it starts
    elif how == "reader gone":
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
    elif how == "disk full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), encoding=how)


@pytest.mark.parametrize(
    "how", ["closed before", "reader gone", "ascii", pytest.param("disk full", marks=pytest.mark.skipif(
        not Path("/dev/full").exists(), reason="no /dev/full"
    ))]
)  # fmt: skip
def test_training_outlives_its_console(launch, toy, tmp_path, how):
    words = [*flags(toy), "--log-dir", str(tmp_path), "--run-name", "run", "--sample-every", "6"]
    training = launch(None, *words, "--sample-prompt", "日本 ±", patches=[partial(lose_streams, how)])
    assert training.wait() == [0], training.printed()
    assert checkpoint.list_steps(tmp_path / "run")[-1].name == "step_000012"
    if how == "disk full":
        assert "standard output is lost (No space left on device); the work goes on" in training.printed()
    if how == "ascii":
        assert "'?? +-" in training.printed() and "What next:" in training.printed()


@pytest.mark.parametrize(
    ("redirected", "code"),
    [("| head -c 0", 0), (">&- 2>&-", 0), ("> /dev/full 2> /dev/full", 2)],
)
def test_a_script_that_cannot_print_still_writes_its_figures(folder, one_item, tmp_path, redirected, code):
    out = tmp_path / "scores.json"
    command = f"{{python}} {{root}}/hellaswag.py --device cpu --model {folder} --data {one_item} --json {out}"
    done = sh(f"{command} {redirected}; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert json.loads(out.read_text(encoding="utf-8"))["n"] == 1


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("cp1252", "±")])
def test_figures_are_printed_in_any_encoding(folder, one_item, encoding, sign):
    command = f"{{python}} {{root}}/hellaswag.py --device cpu --model {folder} --data {one_item}"
    done = sh(f"{command} | iconv -f {encoding} -t utf-8", PYTHONIOENCODING=encoding)
    assert f"acc_norm 0.00 {sign} 0.00" in done.stdout or f"acc_norm 100.00 {sign} 0.00" in done.stdout


def test_a_pipe_that_is_full_and_does_not_block_loses_nothing(tmp_path):
    read, write = os.pipe()
    os.set_blocking(write, False)
    lines = "".join(f"line {n}\n" for n in range(50_000))
    with open(tmp_path / "out", "wb") as out:
        reader = subprocess.Popen(["sh", "-c", "sleep 0.2; cat"], stdin=read, stdout=out)
    stream = console.wrap(io.TextIOWrapper(open(write, "wb", closefd=False), encoding="utf-8"), outlive=True)
    stream.write(lines)
    stream.flush()
    os.close(write)
    reader.wait(timeout=60)
    os.close(read)
    assert (tmp_path / "out").read_text(encoding="utf-8") == lines


# -----------------------------------------------------------------------------
# signals


def test_sighup_saves_and_stops_with_its_code(launch, toy, tmp_path):
    hold = partial(faults.hold_in_step, 6, tmp_path)
    training = launch(None, *flags(toy), "--log-dir", str(tmp_path), "--run-name", "run", patches=[hold])
    training.wait_for(tmp_path / "reached")
    training.signal(signal.SIGHUP)
    training.wait_for("SIGHUP: stopping after this step, then saving; a second signal discards it")
    (tmp_path / "go").touch()
    assert training.wait() == [128 + signal.SIGHUP]
    assert checkpoint.list_steps(tmp_path / "run")[-1].name == "step_000007"


def ignore_sighup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_run_under_nohup_goes_on(launch, toy, tmp_path):
    hold = partial(faults.hold_in_step, 6, tmp_path)
    words = [*flags(toy), "--log-dir", str(tmp_path), "--run-name", "run"]
    training = launch(None, *words, patches=[ignore_sighup, hold])
    training.wait_for(tmp_path / "reached")
    training.signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert training.wait() == [0]


def test_the_first_ctrl_c_says_what_a_second_would_do(capfd):
    signals = Signals()
    try:
        signals.remember(signal.SIGINT, None)
    finally:
        signals.restore()
    said = "SIGINT: stopping after this step, then saving; Ctrl-C again discards it"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if path.name != "model.py"))
def test_ctrl_c_while_a_script_imports_ends_it_with_130_and_a_line(script, tmp_path):
    for name in ("numpy", "torch", "tyro"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / script)], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (130, f"\n{script}: interrupted\n")


def test_ctrl_c_while_a_script_works_ends_it_with_130_and_a_line(tmp_path):
    fifo = tmp_path / "prompt"
    os.mkfifo(fifo)
    words = [sys.executable, str(ROOT / "generate.py"), "--prompt-file", str(fifo)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    with open(fifo, "wb"):  # waits until the script reads
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "\ngenerate.py: interrupted\n"
    assert process.returncode == 130


# -----------------------------------------------------------------------------
# the terminal's width


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminal")
@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_of_a_run_is_wider_than_the_terminal(config, columns):
    words = [*flags(dataclasses.replace(config, sample_every=6, val_every=6)), "--max-steps", "12"]
    code = f"import train_gpt2; train_gpt2.main(*train_gpt2.parse_args({words!r}))"
    printed = re.sub(r"\x1b\[\d*m", "\0", run_on_terminal(columns, sys.executable, "-c", code))
    lines = [line for line in printed.replace("\0", "").splitlines() if config.log_dir not in line]
    assert not [line for line in lines if len(line) > columns]
    (first, *_, last) = [line for line in lines if "| loss" in line]
    assert re.match(r"step  0/12 \| loss 10\.\d{4} \| +\dm\d\ds left \| +[\d,]+ tok/s", first)
    assert last.startswith("step 11/12 |") and ("| norm" in last) == (columns == 120)
    whole = [len(line.replace("\0", "")) for line in printed.splitlines() if line.startswith("\0step")]
    assert whole and max(whole) <= columns
    evaluation = r"\0step  6/12 \| validation loss \S+ \| perplexity [\d,.]+( \| unigram .+)?\0\n"
    assert re.search(evaluation, printed)


def test_a_pipe_gets_whole_lines_and_print_every_some(config, capsys):
    train(config, print_every=5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "| loss" in line]
    assert [line.split("/")[0] for line in lines] == ["step  0", "step  5", "step 10", "step 11"]
    assert all(re.search(r"left \| .* tok/s \| lr .* \| norm .* ms$", line) for line in lines)


def test_a_bold_line_as_wide_as_the_terminal_stays_whole(monkeypatch):
    monkeypatch.setattr(console, "get_width", lambda: 20)
    line = f"{console.BOLD}{'x' * 10} {'y' * 9}{console.PLAIN}"
    assert console.fold(line) == line
    assert "\n" in console.fold(line.replace("x", "xx", 1))


# -----------------------------------------------------------------------------
# messages


@pytest.mark.parametrize(
    "name", ["plain", "with blank", "a'b", 'say "x"', "$HOME", "~tilde", "-dash", "a[1]*"]
)
@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_a_command_works_when_pasted(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    command = cli.format_command("ls", "-d", "--", tmp_path / name)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (tmp_path / done.stdout.removesuffix("\n")).samefile(tmp_path / name), command


def test_what_to_do_next_is_to_be_pasted_in_any_folder(tmp_path, monkeypatch):
    run = tmp_path / "my runs" / "a"
    for here, there in ((ROOT, False), (tmp_path, True)):
        monkeypatch.chdir(here)
        _, generate, talk, look = report.suggest_next(run / "step_000001", 'It\'s "so"').splitlines()
        words = shlex.split(generate)
        assert Path(words[1]).samefile(ROOT / "generate.py") and Path(words[1]).is_absolute() == there
        assert Path(words[3]).absolute() == run / "step_000001" and words[4:] == ["--prompt", 'It\'s "so"']
        assert shlex.split(talk)[-1] == "--interactive"
        assert Path(shlex.split(look, comments=True)[-1]).samefile(ROOT / "play.ipynb")


def test_a_refusal_is_the_last_thing_under_torchrun(tmp_path):
    torchrun = "{python} -m torch.distributed.run --standalone --nproc-per-node 1"
    for words, reason in (
        ("--batch-size 3", "traceback : train_gpt2.py: --total-batch-tokens 2048 is no multiple of"),
        ("--nonsense 3", "there is no flag --nonsense"),
    ):
        done = sh(f"{torchrun} {{root}}/train_gpt2.py demo {words} --log-dir {tmp_path}")
        *_, rule = report = done.stderr.rstrip().splitlines()[-20:]
        assert done.returncode == 1 and set(rule) == {"="}
        assert reason in "\n".join(report)


def test_a_long_message_is_cut(monkeypatch, capsys):
    def fail():
        raise ValueError("content " * 1_000_000)

    monkeypatch.setattr(sys, "argv", ["a.py"])
    with pytest.raises(SystemExit):
        cli.run(fail)
    assert 1000 < len(capsys.readouterr().err) < 2100
