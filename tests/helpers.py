"""Shared by test files: small models, checkpoints and shards, runs in this process and in forked ones."""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import train_gpt2
from lib import checkpoint, files, run_folder, shard_writer, tokenizer
from model import GPT, GPTConfig
from train_gpt2 import Config

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 50257
ABOUT = {"name": "toy", "tokenizer": {"name": "gpt2"}, "source": "tests", "parts": 1}

# An item in place of HellaSwag's.
ITEM = {
    "ctx": "A man sits on a roof. he", "ctx_a": "A man sits on a roof.", "ctx_b": "he", "label": 1,
    "activity_label": "Roofing", "endings": ["sings.", "lays a tile.", "is a dog of some size.", "flies."],
}  # fmt: skip


def random_model(seed: int = 0, **shape) -> GPT:
    """A small GPT in evaluation mode with large random weights. With GPT-2's own initialisation all tokens
    are about equally likely, and biases and gains have no effect."""
    small = dict(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**small, **shape})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if ".ln_" in name else 0.0, 0.3, generator=generator)
        model.wte.weight[model.config.vocab_size :] = 0.0
    return model


def scripted_model(ids: list[int], block_size: int = 64) -> GPT:
    """A model with GPT-2's vocabulary that predicts ids[p] at every position p for any input."""
    model = GPT(GPTConfig(block_size=block_size, n_layer=1, n_head=1, n_embd=block_size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.zero_()
        model.transformer["wpe"].weight.fill_diagonal_(1.0)  # type: ignore[union-attr]
        for position, token in enumerate(ids):
            model.wte.weight[token, position] = 0.001
    return model


def save_checkpoint(run: Path, model: GPT, step: int = 1, **state) -> Path:
    """A checkpoint as train_gpt2.py writes it, with AdamW's tensors for two parameters."""
    optimizer = {
        f"state.transformer.{name}.exp_avg": torch.full((3, 2), float(step)) for name in ("wte", "wpe")
    }
    whole = model.config.vocab_size == VOCAB_SIZE
    files = tokenizer.build_hf_files(model.config.block_size) if whole else {"tokenizer.json": "{}"}
    return checkpoint.save(run, step, model.config, model.state_dict(), optimizer, state, files)


def resealed(folder: Path, **changes: Any):
    """Changes a checkpoint's state and renews its hash, as an attacker could."""
    body = json.loads((folder / "state.json").read_text(encoding="utf-8")) | changes
    del body["sha256"]
    sealed = {**body, "sha256": files.hash_json(body)}
    (folder / "state.json").write_text(json.dumps(sealed, indent=2), encoding="utf-8")


def write_shards(
    folder: Path, *pieces: np.ndarray, shard_tokens: int = 100, val_tokens: int | None = 10
) -> dict:
    """A data set of one part; returns its manifest."""
    plan = shard_writer.hash_plan(shard_writer.begin(folder, ABOUT))
    with shard_writer.PartWriter(folder, 0, shard_tokens, val_tokens, plan=plan) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.close()
    return shard_writer.merge(folder)


def run_script(name: str, *args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs one of the scripts as a user does. The fixture `script` does so in this process, without the
    seconds that imports take."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", env=env, timeout=120)


# -----------------------------------------------------------------------------
# training

# A run ends with a picture of its curves, which takes more than a second: it is left out unless asked for.
really_draw_curves = run_folder.draw_curves
run_folder.draw_curves = lambda run, out: "not in this test"


def draw_pictures():
    """A patch for Training; in this process, the fixture `pictures`."""
    run_folder.draw_curves = really_draw_curves


def train(cfg: Config, **changes) -> Path:
    """A run in this process, of cfg with these changes; returns its folder."""
    return train_gpt2.main(dataclasses.replace(cfg, **changes))


def resume(run: Path, *words: str) -> Path:
    """Does what `train_gpt2.py --resume <run> <words>` does, in this process."""
    return train_gpt2.main(*train_gpt2.parse_args(["--resume", str(run), *words]))


def flags(cfg: Config) -> list[str]:
    """Returns the command line of cfg."""
    words = []
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def run_on_terminal(columns: int, *words: str, **env: str) -> str:
    """What a program prints on a terminal that is so wide."""
    import fcntl
    import pty
    import termios

    screen, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    with subprocess.Popen(
        words, stdin=side, stdout=side, stderr=side, env=kept | {"TERM": "xterm"} | env, cwd=ROOT
    ) as process:
        os.close(side)
        printed = b""
        with contextlib.suppress(OSError):  # on Linux the end of the output
            while data := os.read(screen, 4096):
                printed += data
    os.close(screen)
    assert process.returncode == 0, printed.decode()
    return printed.decode().replace("\r\n", "\n")


def lines_of(run: Path, *streams: str) -> list[str]:
    """Streams of a run's log (by default the training losses), as they were written."""
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split()[1] in (streams or ("train",))]


def values(run: Path, stream: str = "train") -> list[float]:
    return [float(line.split()[2]) for line in lines_of(run, stream)]


def end_of(run: Path) -> tuple[str, bytes, list[str]]:
    """Returns the last checkpoint's name and weights and every training loss: equal for the same end."""
    last = checkpoint.list_steps(run)[-1]
    return last.name, (last / "model.safetensors").read_bytes(), lines_of(run)


def links(run: Path, to: Path, *steps: int) -> Path:
    """Copies a run with only these checkpoints, whose files are links."""
    for step in steps:
        name = f"step_{step:06d}"
        shutil.copytree(run / name, to / name, copy_function=os.link)
    shutil.copy(run / "log.txt", to / "log.txt")
    return to


def undisturbed(cfg: Config, tmp_path_factory) -> Callable[..., Path]:
    """Returns a function of world_size and changes to cfg, which makes such a run once: its folder."""

    @functools.cache
    def whole(world_size: int = 1, patches: tuple = (), **changes) -> Path:
        log_dir = tmp_path_factory.mktemp("log")
        changed = dataclasses.replace(cfg, log_dir=str(log_dir), **changes)
        Training(log_dir, flags(changed), world_size, patches).finish()
        return log_dir / changed.run_name

    return whole


forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["preload"])


def run_to_file(
    script: str, words: Sequence[str], output: Path, env: dict[str, str], patches: Sequence[Callable]
):
    """Runs `python <script> <words>` in this process, forked for it; the output goes to a file."""
    if "train_gpt2" not in sys.modules:
        raise RuntimeError("the fork server has not imported preload.py: this would take seconds each time")
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    for patch in patches:
        patch()
    sys.argv = [str(ROOT / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Training:
    """`python train_gpt2.py <words>`, or another script, in as many processes as torchrun would start.

    The processes are forked from one that has imported everything, and so start in a tenth of a second.
    patches: functions of a module, or functools.partial of such, which each process calls before it begins.
    """

    def __init__(
        self, folder: Path, words: Sequence[object], world_size: int = 1, patches: Sequence[Callable] = (),
        script: str = "train_gpt2.py",
    ):  # fmt: skip
        words, env = [str(word) for word in words], [{}]
        if world_size > 1:
            # As under torchrun, the store outlives the processes; and no port has to be guessed.
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common = dict(
                WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )  # fmt: skip
            env = [dict(common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world_size)]
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(world_size)]
        self.ranks = [
            forkserver.Process(target=run_to_file, args=(script, words, *its, patches), daemon=True)
            for its in zip(self.outputs, env)
        ]
        for process in self.ranks:
            process.start()

    def printed(self, rank: int | None = None) -> str:
        """Returns the output of a rank, or of all in order."""
        outputs = self.outputs if rank is None else [self.outputs[rank]]
        return "".join(path.read_text(encoding="utf-8") for path in outputs if path.exists())

    def wait_for(self, what: str | Path, rank: int = 0, timeout: float = 60) -> str:
        """Waits until these words are printed or this file exists; returns the output."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            is_over = self.ranks[rank].exitcode is not None
            printed = self.printed(rank)
            if what.exists() if isinstance(what, Path) else what in printed:
                return printed
            if is_over:
                break
            time.sleep(0.005)
        raise AssertionError(f"{what} did not come:\n{self.printed()}")

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def wait(self, timeout: float = 60) -> list[int | None]:
        """Waits for all ranks and returns their exit codes; fails if one does not end in time."""
        end = time.monotonic() + timeout
        for rank, process in enumerate(self.ranks):
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                printed = self.printed()
                self.kill()
                raise AssertionError(f"rank {rank} has not ended after {timeout} s:\n{printed}")
        return [process.exitcode for process in self.ranks]

    def finish(self) -> str:
        """Waits for a run that must succeed; returns its output."""
        codes = self.wait()
        assert not any(codes), f"{codes}:\n{self.printed()}"
        return self.printed()

    def signal(self, number: int, *ranks: int):
        """Sends a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            pid = self.ranks[rank].pid
            if pid and self.ranks[rank].is_alive():
                os.kill(pid, number)

    def kill(self):
        """Ends what still runs."""
        self.signal(signal.SIGKILL)
        for process in self.ranks:
            process.join()
