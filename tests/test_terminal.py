"""lib/terminal.py, in generate.py on a real terminal: line editing, history, colours, Ctrl-C."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT, save_checkpoint, scripted_model

from lib import tokenizer


class Terminal:
    """generate.py on a pseudo-terminal."""

    def __init__(self, folder: Path, *args: str, **env: str):
        import fcntl
        import pty
        import struct
        import termios

        self.screen, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        words = [sys.executable, str(ROOT / "generate.py"), "--model", str(folder), "--device", "cpu", *args]
        clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
        env = {**clean, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "PYTHONUTF8": "1", **env}
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def read(self) -> bool:
        """Waits for more on the screen; False at the end."""
        if not select.select([self.screen], [], [], 60)[0]:
            raise AssertionError(f"nothing more after 60 s:\n{self.seen}")
        data = b""
        with contextlib.suppress(OSError):  # on Linux the end of the output
            data = os.read(self.screen, 4096)
        self.seen += data.decode("utf-8", errors="replace")
        return bool(data)

    def wait_for(self, text: str) -> str:
        """Reads until the text appears. Returns all up to its end, and removes it from `seen`."""
        while text not in self.seen:
            assert self.read(), f"{text!r} did not come:\n{self.seen}"
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str):
        os.write(self.screen, text.encode())

    def enter(self, line: str):
        """Types a line at the next prompt."""
        self.wait_for("> ")
        self.type(line + "\n")

    def interrupt(self):
        """Types Ctrl-C until the screen changes: Python's readline can miss one that comes early."""
        self.seen = ""
        while not self.seen:
            self.type("\x03")
            if select.select([self.screen], [], [], 2)[0]:
                self.read()

    def end(self) -> int:
        """Reads to the end. Returns the exit code."""
        while self.read():
            pass
        os.close(self.screen)
        return self.process.wait(timeout=60)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Starts Terminals, and ends them after the test."""
    opened = []

    def start(*args, **env) -> Terminal:
        opened.append(Terminal(*args, **env))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A checkpoint that repeats " and on" without end."""
    ids = tokenizer.encode(" and on") * 32
    return save_checkpoint(tmp_path_factory.mktemp("run"), scripted_model(ids[:64]))


def test_a_conversation_on_a_terminal_edits_lines_and_recalls_them(terminal, endless):
    flags = ("--interactive", "--temperature", "0", "--max-tokens", "1000000")
    first = terminal(endless, *flags)
    first.enter("Twee\x02\x02\x08o\x04\x04")  # back, back, delete before, o, delete, delete: To
    first.wait_for("To and on and on")
    first.type("\x03")  # Ctrl-C stops the text
    first.wait_for("> ")
    first.type("nonsense")
    first.wait_for("nonsense")
    first.interrupt()  # and clears a line
    first.enter("/set max-tokens 2")
    first.enter("/reset")
    first.enter("\x1b[A\x1b[A\x1b[A")  # three lines up
    first.wait_for("To and on\r\n")
    first.wait_for("> ")
    first.type("\x04")  # Ctrl-D ends
    assert first.end() == 0


@pytest.mark.slow
def test_on_a_terminal_tokens_have_the_colours_of_their_probabilities(terminal, endless):
    flags = ("--prompt", "The sun is", "--temperature", "0", "--max-tokens", "6", "--show-probs")
    coloured = terminal(endless, *flags)
    assert coloured.end() == 0
    text, _, legend = coloured.seen.partition("\r\n")
    assert text.count("\x1b[38;5;196m") == text.count("\x1b[0m") == 6  # none is likely
    assert text.replace("\x1b[38;5;196m", "").replace("\x1b[0m", "") == "The sun is and on and on and on"
    assert "\x1b[38;5;208mfrom 1%\x1b[0m" in legend and "from 50%" in legend
    plain = terminal(endless, *flags, NO_COLOR="1")
    assert plain.end() == 0
    assert "\x1b" not in plain.seen and "sample 1: probability" in plain.seen


@pytest.mark.parametrize("flags", [(), ("--prompt-file", "-")])
def test_ctrl_c_ends_a_single_text_with_130_and_no_traceback(terminal, endless, flags):
    one = terminal(endless, *flags, "--temperature", "0", "--max-tokens", "1000000")
    if flags:
        one.type("Go\n\x04")
    one.wait_for(" and on")
    one.type("\x03")
    assert one.end() == 130
    assert "Traceback" not in one.seen


def test_ctrl_c_stops_a_text_also_where_lines_come_through_a_pipe(endless):
    words = [sys.executable, str(ROOT / "generate.py"), "--model", str(endless), "--device", "cpu"]
    flags = ["--interactive", "--temperature", "0", "--max-tokens", "1000000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([*words, *flags], stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")
    try:
        assert process.stdin and process.stdout
        process.stdin.write("Go\n/set max-tokens 2\n/reset\nStop\n")
        process.stdin.flush()
        assert process.stdout.read(9) == "Go and on"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out.endswith("\nStop and on\n") and "Traceback" not in err
    assert process.returncode == 0


def test_a_reader_that_has_enough_is_no_error(endless):
    command = f"{sys.executable} {ROOT / 'generate.py'} --model {endless} --device cpu --max-tokens 3000"
    words = ["bash", "-o", "pipefail", "-c", f"{command} | head -c 20"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 20, "")
