"""Stage 2: trains GPT-2.

    python train_gpt2.py demo                # no data, no network, no GPU: about 5 minutes on two cores
    python train_gpt2.py                     # GPT-2 124M on FineWeb-Edu (first: python fineweb.py)
    torchrun --standalone --nproc_per_node=8 train_gpt2.py            # the same on 8 GPUs, or --num-gpus 8
    python train_gpt2.py --init-from gpt2 --dataset-path data/mine --warmup-steps 20 --max-steps 500
    python train_gpt2.py --resume            # goes on with the newest run; or --resume log/<run>
    python train_gpt2.py --dry-run           # what it would take: memory, hours, money; --eval-only evaluates
    python train_gpt2.py --hub-repo org/name # checkpoints go to the Hub, too; there: --resume hf://org/name
    python train_gpt2.py --version           # of all that matters, for a report of a fault

On disk: log/<run>/log.txt, a line a fact: <step> <stream> <value> with streams train val hella lr norm toks,
and skip and spike where there is such a step; log/<run>/config.json; log/<run>/step_000250/, a checkpoint
that Hugging Face loads (checkpoint.py).

The preset `gpt2` is the 124M recipe of build-nanogpt: 19,073 steps of 524,288 tokens are 10 billion; its
author's run ended near a validation loss of 3.07 and 30.4% of HellaSwag. `gpt2-fast` is the same network,
with Muon, a higher learning rate and 4 billion tokens (chosen by small runs; not run at this size). Losses
are in nats a token; an untrained model's is ln(50257) = 10.82.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import secrets
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import hellaswag
from lib import checkpoint, files, hub, hub_shards, plan, shards, tokenizer, trackers
from lib.device import peak_flops, pick_device, pick_dtype, versions
from model import GPT, GPTConfig

ROOT = files.ROOT


@dataclass(frozen=True)
class Config:
    # data
    dataset_path: str = "data/fineweb-edu-10BT"
    """Folder of token shards, as fineweb.py makes them, or hf://datasets/org/name: shards on the Hugging Face
    Hub, fetched as they are needed."""
    cache_gb: float = 20.0
    """Disk space for a data set's shards from the Hub, under data/hub/; those not needed for longest make
    room."""
    # model
    model_size: str = "124M"
    """124M, 350M, 774M or 1558M, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    n_layer: int | None = None
    """Layers, instead of the size's."""
    n_head: int | None = None
    """Attention heads, instead of the size's."""
    n_embd: int | None = None
    """Channels, instead of the size's."""
    seq_len: int = 1024
    """Tokens of context, T."""
    dropout: float = 0.0
    """Dropout probability; 0 for pre-training, 0.1 helps on small data."""
    init_from: str = ""
    """Start from these weights (a checkpoint, a size name or a Hub id) instead of random ones:
    fine-tuning."""
    # optimization
    batch_size: int | Literal["auto"] = 16
    """Sequences a process and micro-step, B; auto: the most that fit the memory, which changes the speed
    only."""
    total_batch_tokens: int = 524_288
    """Tokens an optimizer step; gradients are accumulated until they are reached."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up a cosine, or (warm-up, stable, decay) the peak and then a straight line down."""
    decay_ratio: float = 0.4
    """Of a wsd schedule, the share of max_steps that the line takes."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this fraction of the peak."""
    max_steps: int = 19_073
    """Optimizer steps."""
    warmup_steps: int = 715
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Weight decay on matrices and embeddings."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this norm; 0 for no clipping."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon on the matrices inside the blocks and AdamW on the rest."""
    seed: int = 1337
    """Initial weights, data order and dropout."""
    # machine
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; weights are float32."""
    compile: bool = True
    """Compile the model with torch.compile; where that fails, training goes on without."""
    activation_checkpointing: bool = False
    """Keep of each block its input only, and compute the rest again in the backward pass: less memory, a
    third more work."""
    fsdp: bool = False
    """Divide weights, gradients and optimizer state among the processes (FSDP); without, each has all."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which processes exchange gradients, once a step; bfloat16 halves the traffic."""
    num_gpus: int = 1
    """Processes on this machine, one a GPU (on a machine without: CPU processes); what torchrun would
    start."""
    timeout_seconds: float = 600.0
    """How long processes wait for one that does not answer."""
    # run
    run_name: str = ""
    """Folder under log/; by default the model and the time."""
    log_dir: str = ""
    """Where run folders go; by default log/ beside this script."""
    resume: str = ""
    """Go on with a run: its folder, one of its checkpoints, or hf://org/name on the Hub; without a value, the
    newest run, or --run-name's (which begins if it has no checkpoint yet, so that a job can be requeued as it
    is)."""
    override: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --resume: accept settings or data that differ from those of the checkpoint."""
    max_hours: float = 0.0
    """When it has run for so long, end the step, save and stop (exit code 4); a --resume has as long again,
    and so has a restart by torchrun's --max-restarts; 0 for no limit."""
    eval_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only evaluate the model of --resume or --init-from, and leave log/ as it is."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only check settings, data and machine, and print what the run would take; write nothing."""
    dollars_per_gpu_hour: float = 0.0
    """Price from which --dry-run computes the cost; 0 for none."""
    # periodic jobs: every so many steps and at the end; 0 for never
    val_every: int = 250
    """Validation loss."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split to use."""
    hellaswag_every: int = 250
    """HellaSwag accuracy."""
    hellaswag_limit: int = 0
    """HellaSwag items to use; 0 for all 10,042."""
    sample_every: int = 250
    """Four sampled texts."""
    sample_prompt: str = "Hello, I'm a language model,"
    """What the samples begin with."""
    checkpoint_every: int = 5000
    """A checkpoint."""
    checkpoint_minutes: float = 0.0
    """Also a checkpoint when the last is this old; 0 for no such rule."""
    keep_last: int = 0
    """Keep only the newest so many checkpoints, the one with the lowest validation loss, and those of
    --keep-every; 0 for all."""
    keep_every: int = 0
    """Keep the checkpoints of steps that this divides."""
    hub_repo: str = ""
    """Send checkpoints to this model repository of the Hugging Face Hub (org/name), in the background."""
    tracker: trackers.Name = "none"
    """Send the log's curves to TensorBoard, Weights & Biases or Trackio, too (trackers.py)."""
    # numerical faults
    max_bad_steps: int = 5
    """Steps in a row whose loss or gradient is not finite, after which the run saves and stops."""
    spike_zscore: float = 6.0
    """A training loss so many standard deviations above the mean of the last 128 is logged as a spike; 0 for
    none."""
    skip_spikes: bool = False
    """Leave the weights as they are at a spike."""

    @property
    def is_resumed(self) -> bool:
        """Whether resume is a checkpoint: `main` has replaced what else it may have been."""
        return self.resume not in ("", "newest")


PRESETS = {
    "gpt2": Config(),
    # Four tenths of gpt2's tokens. Small runs chose it (log/gpt2-fast): there Muon's best rate is six times
    # AdamW's. That is also the 0.02 of Muon's author (github.com/KellerJordan/Muon) in torch's scaling to the
    # size of AdamW's updates, by 0.2 * sqrt(768).
    "gpt2-fast": Config(optimizer="muon", learning_rate=3.6e-3, max_steps=7_629, warmup_steps=286),
    "demo": Config(
        dataset_path="data/pydocs",
        n_layer=4,
        n_head=4,
        n_embd=256,
        seq_len=256,
        batch_size=8,
        total_batch_tokens=4096,
        learning_rate=3e-3,
        max_steps=220,
        warmup_steps=10,
        optimizer="muon",
        compile=False,
        val_every=50,
        hellaswag_every=0,
        sample_every=100,
        sample_prompt="This function returns",
        checkpoint_every=100,
    ),
}

# What a resumed run may change. Only max_steps changes what it learns: the schedule then ends elsewhere.
FREE_TO_CHANGE = {
    "batch_size", "max_steps", "device", "compile", "activation_checkpointing", "fsdp", "num_gpus",
    "dataset_path", "cache_gb", "init_from", "run_name", "log_dir", "resume", "override", "val_every",
    "val_tokens", "hellaswag_every", "hellaswag_limit", "sample_every", "sample_prompt", "checkpoint_every",
    "checkpoint_minutes", "keep_last", "keep_every", "max_bad_steps", "timeout_seconds", "hub_repo",
    "max_hours", "eval_only", "dry_run", "dollars_per_gpu_hour", "tracker",
}  # fmt: skip

# What --override cannot change: the saved tensors would not fit.
SHAPE = {"model_size", "n_layer", "n_head", "n_embd", "optimizer"}

# Where and how it was started.
NOT_SETTINGS = {
    "resume", "override", "run_name", "log_dir", "num_gpus", "eval_only", "dry_run", "dollars_per_gpu_hour",
}  # fmt: skip

STOP_SIGNALS = [getattr(signal, s) for s in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, s)]
VAL_BATCH_TOKENS = 8192  # of a batch in validation
SPIKE_WINDOW = 128  # steps, as OLMo 2 has it (OLMo team, 2025, arXiv:2501.00656)


# -----------------------------------------------------------------------------
# configuration


def read_flags(argv: list[str], base: Config | None = None) -> Config:
    """A command line as a configuration: flags over base, or else over the preset it begins with."""
    argv = list(argv)
    preset = argv.pop(0) if argv and argv[0] in PRESETS else "gpt2"
    for i, word in enumerate(argv):  # --resume without a value
        if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            argv.insert(i + 1, "newest")
    description = f"{__doc__}\nThe first word may be a preset, {' or '.join(PRESETS)} (by default gpt2)."
    return tyro.cli(Config, args=argv, default=base or PRESETS[preset], description=description)


def parse_args(argv: list[str]) -> Config:
    """The configuration a command line means; a resumed run starts from what it was saved with."""
    cfg = read_flags(argv)
    found = find_checkpoint(cfg) if cfg.resume else None
    if found is None:
        return cfg
    saved = checkpoint.verify_state(found).get("config", {})
    if unknown := saved.keys() - {field.name for field in dataclasses.fields(Config)}:
        raise ValueError(f"{found} has settings that are not known here: {', '.join(sorted(unknown))}")
    if cfg.resume.startswith(hub.PREFIXES["model"]):  # which may be another's: where to write, we say
        saved |= {"hub_repo": "", "tracker": "none"}
    return at_checkpoint(read_flags(argv, Config(**saved)), found)


def at_checkpoint(cfg: Config, found: Path) -> Config:
    """The configuration that goes on from this checkpoint, in its run."""
    return dataclasses.replace(
        cfg, resume=str(found), run_name=found.parent.name, log_dir=str(found.parent.parent)
    )


def find_checkpoint(cfg: Config) -> Path | None:
    """The checkpoint that --resume means; None where --run-name names a run that has none yet."""
    log_root = Path(cfg.log_dir) if cfg.log_dir else files.LOGS
    if cfg.resume.startswith(hub.PREFIXES["model"]):
        if cfg.dry_run or cfg.eval_only:
            repo = cfg.resume.removeprefix(hub.PREFIXES["model"])
            raise ValueError(
                f"--resume {cfg.resume} writes the run here, which --dry-run and --eval-only must not do; "
                f"to evaluate its model: --init-from {repo} --eval-only"
            )
        return checkpoint.pull(cfg.resume, log_root, cfg.run_name).resolve()
    if cfg.resume != "newest":
        run = Path(cfg.resume)
        if not run.is_dir():
            raise FileNotFoundError(
                f"--resume {cfg.resume!r} is no folder; give a run (log/<run>) or a checkpoint in it"
            )
        is_checkpoint = (run / checkpoint.STATE).is_file()
        name = (run.parent if is_checkpoint else run).resolve().name
        if cfg.run_name not in ("", name):
            raise ValueError(f"--run-name is {cfg.run_name!r}, but --resume {run} is of the run {name!r}")
        if is_checkpoint:
            return run.resolve()
    else:
        named = cfg.run_name and checkpoint.run_folder(log_root, cfg.run_name)
        run = named or checkpoint.newest_run(log_root)
        if not checkpoint.steps(run):
            return None
    found, passed_over = checkpoint.newest_valid(run)
    for reason in passed_over:
        print(f"resume: passed over a checkpoint: {reason}", file=sys.stderr)
    if found is None:
        raise ValueError(f"{run} has no valid checkpoint to resume from")
    return found.resolve()


def check(cfg: Config, world_size: int):
    """Raises ValueError for values that cannot work, with the value, the bound and the nearest that does."""
    if not cfg.eval_only:
        trackers.check(cfg.tracker)
    positive = (
        "seq_len", "batch_size", "total_batch_tokens", "learning_rate", "num_gpus", "val_tokens", "cache_gb",
        "max_bad_steps", "timeout_seconds",
    )  # fmt: skip
    not_negative = (
        "val_every", "hellaswag_every", "sample_every", "checkpoint_every", "checkpoint_minutes", "keep_last",
        "keep_every", "max_steps", "warmup_steps", "weight_decay", "grad_clip", "hellaswag_limit", "seed",
        "spike_zscore", "max_hours", "dollars_per_gpu_hour",
    )  # fmt: skip
    rows = 1 if cfg.batch_size == "auto" else cfg.batch_size
    for name in positive:
        if name == "batch_size" and cfg.batch_size == "auto":
            continue
        if not getattr(cfg, name) > 0 or math.isinf(getattr(cfg, name)):
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be a number above 0"
            )
    for name in not_negative:
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be 0 or more")
    for name in ("min_lr_ratio", "decay_ratio"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be in [0, 1]")
    if cfg.fsdp and cfg.optimizer == "muon":
        raise ValueError(
            "--optimizer is muon, which needs whole matrices; --fsdp divides them among the processes and "
            "takes --optimizer adamw only"
        )
    if cfg.eval_only and not cfg.is_resumed and not cfg.init_from:
        raise ValueError(
            "--eval-only needs a model: give --resume (a run, a checkpoint; if alone, the newest run) "
            "or --init-from (a checkpoint, a size name or a Hub id)"
        )
    if cfg.eval_only and not (cfg.val_every or cfg.hellaswag_every or cfg.sample_every):
        raise ValueError(
            "--eval-only has nothing to do: --val-every, --hellaswag-every and --sample-every are 0; set one"
        )
    micro_step = rows * cfg.seq_len * world_size
    if cfg.total_batch_tokens % micro_step and not cfg.eval_only:
        below = cfg.total_batch_tokens // micro_step * micro_step
        near = " or ".join(f"{n}" for n in (below, below + micro_step) if n)
        raise ValueError(
            f"--total-batch-tokens {cfg.total_batch_tokens} is no multiple of the {micro_step} tokens of a "
            f"micro-step (--batch-size {rows} x --seq-len {cfg.seq_len} x {world_size} processes); "
            f"the nearest that are: {near}; or change --batch-size"
        )


def check_same(cfg: Config, data: str, world_size: int, state: dict) -> list[str]:
    """Raises ValueError where a resumed run would not be the run that was saved, and says in what. Returns
    what else has changed."""
    before = dataclasses.asdict(Config()) | state["config"]  # an older version had fewer settings
    was = {name: old for name, old in before.items() if getattr(cfg, name) != old}
    changes = {
        name: f"--{name.replace('_', '-')} was {old!r}, is {getattr(cfg, name)!r}"
        for name, old in was.items()
    }
    changed = [text for name, text in changes.items() if name not in FREE_TO_CHANGE]
    allowed = [text for name, text in changes.items() if name in FREE_TO_CHANGE - NOT_SETTINGS]
    if world_size != state["world_size"]:
        allowed.append(f"the processes were {state['world_size']}, are {world_size}")
    if cfg.max_steps < state["step"]:
        raise ValueError(f"--max-steps is {cfg.max_steps}; {cfg.resume} already is at step {state['step']}")
    if data != state["data"]:
        changed.append(f"the shards in {cfg.dataset_path} are not those of the checkpoint")
    if misfits := [changes[name] for name in SHAPE & was.keys()]:
        raise ValueError(f"{cfg.resume} has another shape: {'; '.join(misfits)}; start a new run for that")
    if changed and not cfg.override:
        raise ValueError(
            f"{cfg.resume} is of another run: {'; '.join(changed)}. To go on all the same: --override"
        )
    return changed + allowed


# -----------------------------------------------------------------------------
# processes, device, precision


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started."""

    rank: int
    world_size: int
    device: torch.device
    store: Store | None = None  # torchrun's: what the processes tell each other outside of training
    is_orphan: threading.Event = field(default_factory=threading.Event)  # set when torchrun is gone
    is_over: threading.Event = field(default_factory=threading.Event)  # set at the end

    def beat(self):
        """Counts the seconds that this process is alive, where the others can see it, until the store is
        gone: then torchrun was killed and has left its processes behind."""
        with contextlib.suppress(RuntimeError):
            while self.store:
                self.store.add(f"seconds of rank {self.rank}", 1)
                if self.is_over.wait(1):
                    return
        self.is_orphan.set()

    def silent(self) -> str:
        """Which processes do not count any more. Takes some seconds."""
        if not self.store:
            return "there is no other"
        names, before, after = [f"seconds of rank {rank}" for rank in range(self.world_size)], [], []

        def look(store: Store):
            with contextlib.suppress(RuntimeError):
                before.extend(store.add(name, 0) for name in names)
                time.sleep(2.5)
                after.extend(store.add(name, 0) for name in names)

        looking = threading.Thread(target=look, args=(self.store,), daemon=True)
        looking.start()
        looking.join(4.0)
        if len(after) < len(names):
            return "no sign of life from torchrun, or from rank 0 where there is none"
        silent = [str(rank) for rank in range(self.world_size) if before[rank] == after[rank]]
        return f"no sign of life from rank {', '.join(silent)}" if silent else "all ranks are alive"

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.world_size == 1:
            return list(values)
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        totals = torch.tensor(values, dtype=kind, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]


class Signals:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1, upon which the run saves at the end of the step and
    stops. A second one ends the process at once; what comes within a second of the first is taken for its
    echo, because torchrun passes on what the terminal has sent to all."""

    def __init__(self):
        self.caught, self.when = 0, 0.0
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.remember) for number in STOP_SIGNALS}

    def restore(self):
        """Leaves signals as they were: a notebook goes on after its run."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: Any):
        if self.caught and time.monotonic() - self.when > 1:
            os._exit(128 + number)
        if not self.caught:
            self.caught, self.when = number, time.monotonic()


def meet(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name for these processes together, which none of an earlier try had. torchrun's count of restarts
    will not do: each machine has its own. Raises RuntimeError where some do not come."""
    mine, name, end = secrets.token_hex(8), "", time.monotonic() + timeout_seconds
    everyone = [f"token of rank {number}" for number in range(world_size)]
    for key in ("tokens", *everyone) if rank == 0 else ("tokens",):
        store.compare_set(key, "", "none")  # so that reading does not wait
    store.set(everyone[rank], mine)
    while time.monotonic() < end:
        if rank == 0:  # of ranks that have not come yet these may be tokens of an earlier try, or none
            store.set("tokens", " ".join(token.decode() for token in store.multi_get(everyone)))
        tokens = store.get("tokens").decode()
        seen = files.hash_json(tokens)
        if seen != name and mine in tokens:
            name = seen
            store.add(name, 1)
        if name and store.add(name, 0) == world_size:
            return name
        time.sleep(max(0.02, world_size / 1000))
    raise RuntimeError(
        f"rank {rank}: not all of the {world_size} processes came within {timeout_seconds:g} s "
        "(--timeout-seconds)"
    )


def start_process(cfg: Config) -> Process:
    """Joins torchrun's process group, if torchrun started us, and picks the device, a GPU a process."""
    if "RANK" not in os.environ:
        return Process(0, 1, pick_device(cfg.device))
    name = cfg.device
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name, spare_memory=cfg.fsdp)
    if device.type == "mps":
        raise ValueError(
            "--device mps has one GPU and takes one process; several processes need --device cpu"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, else by rank 0
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=rank == 0 and not hosted, wait_for_workers=False)
    # After a restart torchrun's store still has the addresses of processes that are gone: each try has names
    # of its own (else gloo now and then tried to connect to those, with torch 2.13).
    store = PrefixStore(meet(store, rank, world_size, cfg.timeout_seconds), store)
    timeout = datetime.timedelta(seconds=cfg.timeout_seconds)
    options: dict[str, Any] = dict(store=store, rank=rank, world_size=world_size, timeout=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    return Process(rank, world_size, device, store)


def compiled(
    model: GPT, x: torch.Tensor, y: torch.Tensor, autocast: torch.autocast
) -> tuple[torch.nn.Module, str]:
    """torch.compile(model), tried on one batch, or the model itself where that fails; and what to say."""
    fast = torch.compile(model.train())
    begin = time.perf_counter()
    try:
        with autocast:
            loss = fast(x, y)
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a missing or broken compiler raises
        torch._dynamo.reset()
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return model, f"torch.compile does not work here ({reason}); training goes on without it"
    finally:
        model.zero_grad(set_to_none=True)
    return fast, f"compiled in {time.perf_counter() - begin:.0f} s"  # type: ignore[return-value]


def compile_blocks(model: GPT, x: torch.Tensor, y: torch.Tensor, autocast: torch.autocast) -> str:
    """torch.compile for a sharded model: each block by itself, because weights are gathered between them. It
    is tried on a whole model of one layer: where it fails on one process, the others must not wait for it.
    Returns what to say."""
    tried = GPT(dataclasses.replace(model.config, n_layer=1)).to(x.device)
    fast, outcome = compiled(tried, x, y, autocast)
    for block in model.blocks if fast is not tried else ():
        block.forward = torch.compile(block.forward)
    return outcome


def replicated(model: torch.nn.Module, cfg: Config, device: torch.device) -> DistributedDataParallel:
    """The model with gradients that are averaged over all processes, bucket by bucket while the backward pass
    goes on."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if cfg.reduce_dtype == "bfloat16":  # by another name: DDP would refuse it on the CPU, though gloo has it
        ddp.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    return ddp


def sharded(model: GPT, cfg: Config, process: Process) -> GPT:
    """The model on the device, its weights divided among the processes, and with them gradients and optimizer
    state (ZeRO-3: Rajbhandari et al., 2020, arXiv:1910.02054); a block's are gathered while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(process.device.type, (process.world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, cfg.reduce_dtype))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)  # type: ignore[return-value]


def gathered(model: GPT) -> GPT:
    """A plain copy of a sharded model, for evaluation. All ranks take part; what each then does with its own
    needs no other, so that one may have more to score than another."""
    with torch.device("meta"):
        whole = GPT(model.config)
    weights: dict[str, Any] = model.state_dict()
    whole.load_state_dict({name: weight.full_tensor() for name, weight in weights.items()}, assign=True)
    return whole.eval()


# -----------------------------------------------------------------------------
# optimizer and schedule


def make_optimizers(cfg: Config, model: GPT) -> list[torch.optim.Optimizer]:
    """AdamW with betas (0.9, 0.95) and eps 1e-8 (GPT-3: Brown et al., 2020, appendix B) and, if asked, Muon
    (Jordan et al., 2024) for the matrices inside the blocks, its update scaled to AdamW's size (Liu et al.,
    2025).

    Weight decay is for matrices and embeddings, not for biases and LayerNorm.
    """
    named = list(model.named_parameters())
    hidden = [p for name, p in named if ".h." in name and p.dim() == 2] if cfg.optimizer == "muon" else []
    rest = [p for _, p in named if not any(p is h for h in hidden)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    ]
    if hidden:
        muon = torch.optim.Muon(
            hidden, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr_ratio of it at max_steps (GPT-3, appendix B),
    or the peak until a line leads there (warm-up, stable, decay: Hu et al., 2024, arXiv:2404.06395)."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        progress = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = min(cfg.decay_ratio * cfg.max_steps, cfg.max_steps - cfg.warmup_steps)
        height = min(1.0, max(0, cfg.max_steps - step) / max(1.0, decay_steps))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * height)


def workload(
    cfg: Config, config: GPTConfig, dtype: torch.dtype, device: torch.device, world_size: int
) -> plan.Workload:
    """A step of this run, as plan.py takes it."""
    return plan.Workload(
        config, cfg.seq_len, cfg.total_batch_tokens, cfg.optimizer, world_size, dtype, device.type, cfg.fsdp,
        cfg.activation_checkpointing,
    )  # fmt: skip


def choose_batch_size(work: plan.Workload, model: GPT, process: Process) -> tuple[int, str]:
    """What --batch-size auto means, the same on all processes, and why. Raises ValueError where not even one
    sequence fits."""
    process.sum(0.0)  # now all have their weights, and no more
    mine, why = work.fitting_batch(model, process.device)
    chosen = int(min(process.sum(*(mine * (r == process.rank) for r in range(process.world_size)))))
    if not chosen:
        raise ValueError(
            f"--batch-size auto: not even one sequence of {work.seq_len} tokens fits ({why}); a smaller "
            "--model-size or --seq-len would"
        )
    return chosen, f"auto, {why}"


# -----------------------------------------------------------------------------
# periodic jobs


@torch.no_grad()
def validation_loss(model: GPT, reader: shards.ShardReader, cfg: Config, process: Process) -> float:
    """Mean loss, nats a token, over the first val_tokens of the validation split: the same figure whatever
    the number of processes and the batch size, because they only share out batches that are always the
    same."""
    windows = min(reader.num_windows, max(1, cfg.val_tokens // cfg.seq_len))
    positions, rows = range(0, windows * cfg.seq_len, cfg.seq_len), max(1, VAL_BATCH_TOKENS // cfg.seq_len)
    mine, total = range(0, windows, rows)[process.rank :: process.world_size], 0.0
    hidden = None if process.rank == 0 else True  # None: shown on a terminal only
    for i in tqdm(mine, "validation", leave=False, disable=hidden):
        x, y = (t.to(process.device) for t in reader.read(positions[i : i + rows]))
        total += model(x, y).item() * x.size(0)  # float32 times a small number: exact, as is their sum
    return process.sum(total)[0] / windows


def z_score(loss: float, recent: Collection[float]) -> float:
    """How many standard deviations a loss is above the mean of recent ones; 0 as long as those are few."""
    if len(recent) < SPIKE_WINDOW // 2:
        return 0.0
    return (loss - statistics.fmean(recent)) / max(statistics.pstdev(recent), 1e-9)


def print_samples(model: GPT, cfg: Config, step: int, device: torch.device):
    """Four continuations of the sample prompt, drawn with a generator of their own."""
    ids = tokenizer.encode(cfg.sample_prompt) or [tokenizer.END_OF_TEXT]
    generator = torch.Generator(device=device).manual_seed(cfg.seed + step)
    rows = model.generate(
        torch.tensor([ids] * 4, device=device), 48, temperature=0.8, top_k=50, generator=generator
    )
    for row in rows[:, len(ids) :].tolist():
        print(f"  sample | {cfg.sample_prompt + tokenizer.decode_until_end(row)!r}")


class RunLog:
    """log.txt, a line a fact: `<step> <stream> <value>`, and the same to a tracker. One process writes, if
    any."""

    def __init__(self, folder: Path, writes: bool, resumed_step: int | None):
        self.file = None
        self.tracker: trackers.Tracker | None = None
        if not writes:
            return
        path = folder / "log.txt"
        if resumed_step is not None and path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) == 3]
            kept = "".join(f"{line}\n" for line in lines if self.is_before(line, resumed_step))
            files.write_atomically(path, lambda f: f.write(kept.encode("utf-8")))
        self.file = open(path, "w" if resumed_step is None else "a", encoding="utf-8")

    @staticmethod
    def is_before(line: str, checkpoint_step: int) -> bool:
        """Whether a line was written before the checkpoint: in a step, evaluations are, training is not."""
        step, stream, _ = line.split()
        return int(step) < checkpoint_step or (int(step) == checkpoint_step and stream in ("val", "hella"))

    def write(self, step: int, **values: float):
        if self.file:
            self.file.writelines(f"{step} {stream} {value:.6g}\n" for stream, value in values.items())
            self.file.flush()
        if self.tracker:
            self.tracker.write(step, values)


# -----------------------------------------------------------------------------
# before the first step and after the last


def find_data(cfg: Config, process: Process) -> shards.Folder:
    """The shards: on the Hub, or in a folder relative to here or to this script; the demo's are made if
    missing, but not where nothing is to be written."""
    if cfg.dataset_path.startswith(hub.HUB_PREFIX):
        first = hub_shards.HubFolder(cfg.dataset_path, 1e9 * cfg.cache_gb) if process.rank == 0 else None
        location = process.agree(first and first.name)  # with its commit: the same for all
        return first or hub_shards.HubFolder(location, 1e9 * cfg.cache_gb)
    data = Path(cfg.dataset_path)
    data = data if data.exists() or data.is_absolute() else ROOT / data
    may_write = process.rank == 0 and not (cfg.dry_run or cfg.eval_only)
    if may_write and data.name == "pydocs" and not shards.is_complete(data):
        print(
            "Making shards of the installed packages' documentation (fineweb.py --source pydocs)", flush=True
        )
        command = [sys.executable, str(ROOT / "fineweb.py"), "--source", "pydocs", "--out-dir", str(data)]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"{data} could not be made")
    process.agree(None)  # the other processes wait for it
    return shards.Folder(data)


def refuse(cfg: Config, process: Process, world_size: int):
    """Raises ValueError or OSError for what could not work on this device, or where the run is to be sent."""
    check(cfg, world_size)
    if cfg.activation_checkpointing and cfg.dropout and process.device.type == "mps":
        raise ValueError(  # torch.utils.checkpoint keeps the state of CUDA's and the CPU's generators only
            f"--dropout is {cfg.dropout}; on mps --activation-checkpointing cannot draw the same twice: leave"
            " out one of the two"
        )
    if process.rank == 0 and not cfg.eval_only:
        if cfg.hub_repo:
            check_hub(cfg)
        if not cfg.is_resumed:
            trackers.check_login(cfg.tracker)


def check_hub(cfg: Config):
    """Raises OSError or ValueError where checkpoints could not be sent to --hub-repo, or would replace those
    of another run. A run that goes on does so without the Hub, too."""
    try:
        hub.check_push(cfg.hub_repo, "model")
        _, found = hub.list_hub(cfg.hub_repo, None, [checkpoint.STATE], "model")
    except OSError as error:
        if not cfg.is_resumed or hub.is_final(error):
            raise
        print(f"note   checkpoints wait for the Hub: {error}", flush=True)
        return
    if found and not cfg.is_resumed:
        raise ValueError(
            f"--hub-repo {cfg.hub_repo} holds a checkpoint: go on with it (--resume hf://{cfg.hub_repo}) or "
            "choose another"
        )


def find_hellaswag(cfg: Config, process: Process) -> tuple[list[dict], str]:
    """The HellaSwag items for the loop, or none and why; rank 0 downloads them."""
    problem = ""
    if process.rank == 0:
        try:
            hellaswag.download()
        except OSError as error:
            problem = str(error)
    problem = process.agree(problem)
    return ([], problem) if problem else (hellaswag.load_items("", cfg.hellaswag_limit), "")


def build_model(cfg: Config) -> GPT:
    """The network that the flags describe, on the CPU, initialised from the seed or from --init-from; for a
    dry run without memory."""
    if cfg.init_from:
        if cfg.model_size != Config.model_size or (cfg.n_layer, cfg.n_head, cfg.n_embd) != (None, None, None):
            raise ValueError(
                "--init-from brings its own shape: leave out --model-size and --n-layer, -head, -embd"
            )
        model, source = checkpoint.load_model(cfg.init_from, "cpu", cfg.dropout, spare_memory=cfg.fsdp)
        if cfg.seq_len > model.config.block_size:
            raise ValueError(
                f"--seq-len {cfg.seq_len} is longer than the {model.config.block_size} of {source}: "
                f"--seq-len {model.config.block_size} is the most it can"
            )
        return model
    shape = {k: v for k in ("n_layer", "n_head", "n_embd") if (v := getattr(cfg, k)) is not None}
    torch.manual_seed(cfg.seed)
    with torch.device("meta" if cfg.dry_run else "cpu"):
        return GPT(GPTConfig.named(cfg.model_size, block_size=cfg.seq_len, dropout=cfg.dropout, **shape))


def find_run(cfg: Config, config: GPTConfig, process: Process) -> Path:
    """The folder of the run. Raises ValueError if that of a new one is there already, or has links in it."""
    name = cfg.run_name or f"gpt2-{config.num_params / 1e6:.0f}M_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    log_root = Path(cfg.log_dir) if cfg.log_dir else files.LOGS
    run = checkpoint.run_folder(log_root, process.agree(name))
    if process.rank == 0 and not (cfg.resume or cfg.eval_only) and run.exists() and any(run.iterdir()):
        raise ValueError(
            f"{run} exists: go on with it (--run-name {run.name} --resume) or choose another --run-name"
        )
    if links := [path for path in run.iterdir() if path.is_symlink()] if run.is_dir() else []:
        raise ValueError(f"{links[0]} is a link; a run writes only into its own folder: remove the link")
    return run


def open_run(
    cfg: Config, config: GPTConfig, process: Process, at_end: contextlib.ExitStack
) -> tuple[Path, dict]:
    """Makes the run's folder, or finds the resumed one's, and locks it until at_end (only evaluating needs
    neither); returns it and the settings as they are saved. Raises ValueError if another process uses it."""
    run = find_run(cfg, config, process)
    settings = dataclasses.asdict(cfg) | {"run_name": run.name, "resume": "", "override": False}
    if process.rank == 0 and not cfg.eval_only:
        at_end.callback(checkpoint.unlock, checkpoint.lock(run))
        run.mkdir(exist_ok=True)
        checkpoint.clean(run)
        (run / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return run, settings


def describe(config: GPTConfig) -> str:
    return (
        f"GPT-2, {config.num_params:,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} channels, {config.block_size} positions"
    )


def describe_batch(cfg: Config, batch_size: int, world_size: int, why: str) -> str:
    micro_steps = cfg.total_batch_tokens // (batch_size * cfg.seq_len * world_size)
    return (
        f"batch  {cfg.total_batch_tokens:,} tokens = {batch_size} sequences x {cfg.seq_len} tokens x "
        f"{world_size} processes x {micro_steps} micro-steps{f' ({why})' if why else ''}"
    )


def shown(path: Path) -> str:
    """The path as one would type it here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def summary(cfg: Config, run: Path) -> str:
    """What the log has of the whole run, however often it was resumed."""
    streams: dict[str, list[tuple[float, int]]] = {}
    for line in (run / "log.txt").read_text(encoding="utf-8").splitlines():
        step, stream, value = line.split()
        streams.setdefault(stream, []).append((float(value), int(step)))
    seconds = sum(cfg.total_batch_tokens / toks for toks, _ in streams.get("toks", []))
    text = f"{cfg.max_steps:,} steps of {cfg.total_batch_tokens:,} tokens, "
    text += f"{format_seconds(seconds)} of training"
    if "val" in streams:
        text += "; best validation loss {:.4f} at step {}".format(*min(streams["val"]))
    if "hella" in streams:
        text += "; HellaSwag acc_norm {:.2%} at step {}".format(*streams["hella"][-1])
    return text


def finish(cfg: Config, run: Path, last_checkpoint: Path | None):
    """Draws the run's curves and says what came of it and what to do next."""
    here = shown(run)
    print(f"\n{summary(cfg, run)}\nDone. The log is in {here}/log.txt.")
    if cfg.val_every:
        command = [sys.executable, str(ROOT / "plot.py"), str(run)]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0:
            print(f"The curves are in {here}/loss.png.")
    if last_checkpoint:
        model, python = shown(last_checkpoint), shown(Path(sys.executable))
        python = "python" if Path(python).is_absolute() else python  # or .venv/bin/python, if not activated
        prompt = cfg.sample_prompt
        prompt = shlex.quote(prompt) if set(prompt) & set('"$`\\!') else f'"{prompt}"'
        print("What next:")
        print(f"  {python} generate.py --model {model} --prompt {prompt}")
        print(f"  {python} hellaswag.py --model {model} --limit 1000   # fetches 12 MB, once")
        print(f"  {python} plot.py {here} --out loss.png")


def main(cfg: Config) -> Path:
    """Trains as cfg says; returns the run's folder."""
    if cfg.resume and (found := find_checkpoint(cfg)):
        cfg = at_checkpoint(cfg, found)
    process = start_process(cfg)
    with contextlib.ExitStack() as at_end:
        if process.store:
            beating = threading.Thread(target=process.beat, daemon=True)
            beating.start()
            # Python must not end while the thread is within the store: that would abort the process.
            at_end.callback(beating.join, 2.0)
            at_end.callback(process.is_over.set)  # callbacks are called last to first
        try:
            return dry_run(cfg, process) if cfg.dry_run else train(cfg, process, at_end)
        except RuntimeError:  # where one process is lost, the others fail in what they do together
            if process.world_size > 1:
                print(f"rank {process.rank} failed; {process.silent()}", file=sys.stderr, flush=True)
            raise


def train(cfg: Config, process: Process, at_end: contextlib.ExitStack) -> Path:
    """The whole of a run, from the data to the last checkpoint; what is to be given back, however it ends, it
    leaves to at_end."""
    rank, world_size, device = process.rank, process.world_size, process.device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it

    def say(text: str):
        if rank == 0:
            print(text, flush=True)

    began = time.monotonic()
    refuse(cfg, process, world_size)

    # ---- data
    data = find_data(cfg, process)
    train_data = shards.ShardReader(data, "train", cfg.seq_len, cfg.seed)
    val_data = shards.ShardReader(data, "val", cfg.seq_len, cfg.seed) if cfg.val_every else None
    data_fingerprint = data.fingerprint()
    sequences = cfg.total_batch_tokens // cfg.seq_len  # a step

    # ---- model, optimizers and, where a run goes on, their state
    saved = checkpoint.load(Path(cfg.resume), cfg.dropout) if cfg.is_resumed else None
    resumed = saved.state if saved else {}
    digest = files.hash_json(resumed)
    if process.sum(digest != process.agree(digest))[0]:
        place = cfg.resume if resumed else "a new run"
        raise ValueError(
            f"the processes do not begin alike: this one with {place}; all must see one --log-dir"
        )
    changes = check_same(cfg, data_fingerprint, world_size, resumed) if resumed else []
    raw_model = saved.model if saved else build_model(cfg)
    config, is_sharded = raw_model.config, cfg.fsdp and world_size > 1
    raw_model = sharded(raw_model, cfg, process) if is_sharded else raw_model.to(device)
    raw_model.recompute = cfg.activation_checkpointing
    dtype, why = process.agree(pick_dtype(cfg.dtype, device, resumed.get("dtype")))
    autocast = torch.autocast(
        device.type,
        dtype,
        enabled=dtype != torch.float32,
        cache_enabled=not cfg.activation_checkpointing,  # it keeps cast copies of all weights in the forward
    )
    batch_size, batch_why = cfg.batch_size, ""
    if batch_size == "auto":
        work = workload(cfg, config, dtype, device, world_size)
        # Evaluating alone has no gradients: any number will do.
        batch_size, batch_why = (8, "") if cfg.eval_only else choose_batch_size(work, raw_model, process)
        cfg = dataclasses.replace(cfg, batch_size=batch_size)  # as it is saved
    accumulation = sequences // (batch_size * world_size)  # micro-steps a step
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizers = make_optimizers(cfg, raw_model)
    if saved and not cfg.eval_only:
        checkpoint.load_optimizers(raw_model, optimizers, saved.optimizer)
        if scaler.is_enabled() and resumed["scaler"]:
            scaler.load_state_dict(resumed["scaler"])
    saved = None  # its tensors have been copied
    run, settings = open_run(cfg, config, process, at_end)
    log = RunLog(run, rank == 0 and not cfg.eval_only, resumed.get("step"))

    # ---- header
    manifest = shards.read_manifest(data.folder) or {}
    source = manifest.get("source", data.name)
    source = source if ":" in source else Path(source).name  # of a local file, where it was is not for all
    trained_on = f"{source} ({train_data.num_tokens:,} tokens)"
    entropy = val_data.unigram_entropy(cfg.val_tokens) if val_data else math.nan
    epochs = cfg.max_steps * sequences / train_data.num_windows
    description = describe(config)
    say(f"model  {description}; {cfg.optimizer}")
    say(f"data   {shown(data.folder)}: {train_data.num_tokens:,} training tokens, {epochs:.2f} epochs")
    if not cfg.eval_only:
        say(describe_batch(cfg, batch_size, world_size, batch_why))
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    say(f"device {device}{gpu}, {str(dtype).removeprefix('torch.')} ({why})")
    if cfg.fsdp:
        say(f"fsdp   {1 / world_size:.0%} of weights, gradients and optimizer state on each process")
    if val_data:
        say(f"loss   {math.log(config.vocab_size):.2f} if all tokens were alike, {entropy:.2f} if a model "
            "knows only how frequent each is (the validation split's unigram entropy)")  # fmt: skip
    if cfg.warmup_steps > cfg.max_steps and not cfg.eval_only:
        say(f"note   the run ends within its {cfg.warmup_steps} steps of warm-up (--warmup-steps)")
    if cfg.eval_only:
        say(f"only evaluating {shown(Path(cfg.resume)) if resumed else cfg.init_from}; nothing is written")
    else:
        say(f"run    {shown(run)}" + (f", resumed at step {resumed['step']}" if resumed else ""))
    for change in changes:
        say(f"note   {change}")
    if resumed and rank == 0 and not cfg.eval_only:
        for folder in checkpoint.abandon(run, resumed["step"]):
            say(f"note   a newer checkpoint is now {shown(folder)}")
    # A copy of a run under another name has curves of its own.
    is_same = resumed and resumed["config"].get("run_name") == run.name
    tracker_id = resumed.get("tracker_id") if is_same else None
    tracker_id = tracker_id or secrets.token_hex(4)
    if cfg.tracker != "none" and rank == 0 and not cfg.eval_only:
        tracker = trackers.Tracker(cfg.tracker, run, tracker_id, settings, resumed.get("step"))
        log.tracker = at_end.enter_context(tracker)
        if tracker.tool:
            say(f"track  {cfg.tracker}, into {shown(tracker.tool.where)}")

    # ---- what wraps the model; evaluation and checkpoints use raw_model
    model: torch.nn.Module = raw_model
    if (cfg.compile or world_size > 1) and not cfg.eval_only:  # a batch to try things on
        first = train_data.batch(resumed.get("step", 0), 0, batch_size, sequences)
        x, y = (t.to(device) for t in first)
    if cfg.compile and not cfg.eval_only:
        say("note   compiling, which may take a minute; --no-compile does without")
        torch._dynamo.config.optimize_ddp = False  # one graph; ours has nothing to gain from cutting it
        if is_sharded:
            outcome = compile_blocks(raw_model, x, y, autocast)
        else:
            model, outcome = compiled(raw_model, x, y, autocast)
        say(f"note   {outcome}")
    if world_size > 1 and not is_sharded and not cfg.eval_only:
        model = replicated(model, cfg, device)
        # After its first backward pass DDP puts the gradients in another order, and adds them up in another.
        # So that pass is not a step of the run, or a resumed run would differ from an uninterrupted one.
        with autocast:
            loss = model(x, y)
        loss.backward()
        model.zero_grad(set_to_none=True)
    hellaswag_items = []
    if cfg.hellaswag_every:
        hellaswag_items, problem = find_hellaswag(cfg, process)
        if problem and cfg.eval_only and not (cfg.val_every or cfg.sample_every):
            raise ValueError(f"--eval-only: HellaSwag cannot be had: {problem}")
        if problem:
            say(f"note   HellaSwag is left out: {problem}")
    peak = peak_flops(device, dtype) * world_size

    # ---- the loop: max_steps + 1 times, the last only evaluates and saves
    first_step, last_checkpoint = resumed.get("step", 0), Path(cfg.resume) if resumed else None
    best_val_loss, bad_steps = resumed.get("best_val_loss"), resumed.get("bad_steps", 0)
    recent_losses = deque(resumed.get("recent_losses", []), maxlen=SPIKE_WINDOW)
    signals, saver = Signals(), checkpoint.Saver(run, cfg.keep_last, cfg.keep_every, cfg.hub_repo)
    at_end.callback(signals.restore)
    if cfg.eval_only:
        signals.restore()  # Ctrl-C ends it at once
    elif rank == 0:
        saver.send(last_checkpoint)  # it may not have reached the Hub
    stop_code, overdue, saved_at, train_seconds = 0, False, time.monotonic(), 0.0
    steps = range(first_step, cfg.max_steps)
    batches = train_data.batches(
        steps, accumulation, batch_size, sequences, rank, world_size, pin_memory=device.type == "cuda"
    )
    for step in range(first_step, cfg.max_steps + 1):
        due = jobs_due(step, cfg)
        if stop_code:
            due = {"checkpoint": True}
        elif resumed and step == first_step and not cfg.eval_only:
            # It may have been evaluated before it was saved.
            due = {} if resumed.get("evaluated", True) else {**due, "checkpoint": False}
        val_loss = hellaswag_score = None
        raw_model.eval()
        is_evaluated = any(due.get(job) for job in ("val", "hellaswag", "sample"))
        whole_model = gathered(raw_model) if is_sharded and is_evaluated else raw_model
        if val_data and due.get("val"):
            with autocast:
                val_loss = validation_loss(whole_model, val_data, cfg, process)
            best_val_loss = min(val_loss, val_loss if best_val_loss is None else best_val_loss)
            log.write(step, val=val_loss)
            say(f"step {step:>6} | validation loss {val_loss:.4f} (unigram entropy {entropy:.2f})")
        if hellaswag_items and due.get("hellaswag"):
            with autocast:
                scores = hellaswag.evaluate(whole_model, hellaswag_items, protocols=("completion",))
            hellaswag_score = scores["completion"]["acc_norm"]
            log.write(step, hella=hellaswag_score)
            say(f"step {step:>6} | HellaSwag acc_norm {hellaswag_score:.2%} of {scores['n']:,} items")
        if due.get("sample") and rank == 0:
            with autocast:
                print_samples(whole_model, cfg, step, device)
        del whole_model  # where it is a copy, its memory is for training
        if due.get("checkpoint") or overdue:
            begin = time.perf_counter()
            for news in saver.poll(wait=True):
                say(f"step {step:>6} | {news}")
            state = {
                "model": description,
                "trained_on": trained_on,
                "config": settings,
                "world_size": world_size,
                "data": data_fingerprint,
                "dtype": str(dtype).removeprefix("torch."),
                "scaler": scaler.state_dict(),
                "evaluated": not stop_code,
                "val_loss": val_loss,
                "best_val_loss": best_val_loss,
                "hellaswag": hellaswag_score,
                "bad_steps": bad_steps,
                "tracker_id": tracker_id,
                "recent_losses": list(recent_losses),
                "versions": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")},
            }
            hf_files = tokenizer.hf_files(config.block_size)
            weights, optimizer_state = checkpoint.gather_state(raw_model, optimizers)
            if rank == 0:
                saver.begin(step, config, weights, optimizer_state, state, hf_files)
            last_checkpoint, saved_at = run / f"step_{step:06d}", time.monotonic()
            say(f"step {step:>6} | saving {shown(last_checkpoint)}; training paused for "
                f"{1000 * (time.perf_counter() - begin):.0f} ms")  # fmt: skip
        if stop_code or step == cfg.max_steps or cfg.eval_only:
            break

        begin = time.perf_counter()
        model.train()
        # Dropout is drawn from the step's own seed, not from what was drawn before.
        torch.manual_seed((cfg.seed * 2**40 + step * 2**12 + rank) % 2**63)
        lr = learning_rate(step, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        train_loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            x, y = (t.to(device, non_blocking=True) for t in next(batches))
            is_last = micro_step == accumulation - 1  # gradients are exchanged once, in the last backward
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = is_last
            elif is_sharded:
                raw_model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            with autocast:
                loss = model(x, y)
            loss = (
                loss / accumulation
            )  # backward adds gradients up; the step wants their mean over micro-steps
            train_loss += loss.detach()
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip or math.inf)
        if is_sharded:
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        is_old = cfg.checkpoint_minutes and time.monotonic() - saved_at > 60 * cfg.checkpoint_minutes
        is_late = cfg.max_hours and time.monotonic() - began > 3600 * cfg.max_hours
        caught = [signals.caught == number for number in STOP_SIGNALS]
        loss_sum, old, late, orphans, *signaled = process.sum(
            train_loss.item(), bool(is_old and rank == 0), bool(is_late), process.is_orphan.is_set(), *caught
        )  # .item() waits for the device
        loss_value, overdue = loss_sum / world_size, bool(old)
        is_finite = math.isfinite(loss_value) and bool(norm.isfinite())  # both are the same on all processes
        surprise = z_score(loss_value, recent_losses)
        is_spike = surprise > cfg.spike_zscore > 0
        if is_finite and not (is_spike and cfg.skip_spikes):  # else the weights stay as they are
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begin

        train_seconds += seconds
        left = train_seconds / (step - first_step + 1) * (cfg.max_steps - step - 1)
        toks = cfg.total_batch_tokens / seconds
        mfu = f" | mfu {toks * config.flops_per_token(cfg.seq_len) / peak:5.1%}" if peak else ""
        log.write(step, train=loss_value, lr=lr, norm=norm.item(), toks=toks)
        overflow = scaler.is_enabled() and math.isfinite(loss_value) and scaler.get_scale() >= 1
        bad_steps = 0 if is_finite or overflow else bad_steps + 1
        if not is_finite:
            log.write(step, skip=1)
            say(f"step {step:>6} | loss or gradient is not finite: the weights are left as they are")
        if is_spike:
            log.write(step, spike=surprise)
            skipped = "; the weights are left as they are" if cfg.skip_spikes else ""
            say(f"step {step:>6} | a spike, {surprise:.1f} standard deviations above the mean{skipped}")
        if math.isfinite(loss_value):
            recent_losses.append(loss_value)
        if bad_steps >= cfg.max_bad_steps:
            stop_code = 3
            say(f"stopping: {bad_steps} steps in a row were not finite; try a lower --learning-rate, or "
                "--dtype float32")  # fmt: skip
        if late and not stop_code:
            stop_code = 4
            say(f"stopping: it has run for --max-hours {cfg.max_hours:g}")
        if orphans:
            stop_code = 128 + signal.SIGTERM
            say("stopping: torchrun is gone")
        for number, count in zip(STOP_SIGNALS, signaled):
            if count:
                stop_code = 128 + number
                say(f"stopping: {signal.Signals(number).name} was received")
        for news in saver.poll():
            say(f"step {step:>6} | {news}")
        say(
            f"step {step:>6} | loss {loss_value:7.4f} | lr {lr:.2e} | norm {norm:7.3f} | "
            f"{1000 * seconds:8.1f} ms | {toks:9,.0f} tok/s{mfu} | {format_seconds(left)} left"
        )

    for news in saver.poll(wait=True):
        say(f"step {step:>6} | {news}")
    if log.tracker:  # before the others may end: torchrun gives rank 0 no time after that
        log.tracker.close(stop_code)
    process.agree(None)  # where rank 0 could not write its last checkpoint, the others fail here
    signals.restore()
    if world_size > 1:
        # DDP must not hold the last reference to gloo's group: its destructor would join gloo's threads while
        # it holds the interpreter's lock, for which one of them may be waiting (a hang seen with torch 2.13).
        del model
        dist.destroy_process_group()
    if rank == 0 and not cfg.eval_only:
        for news in saver.finish(wait=not stop_code):
            say(news)
        if not stop_code:
            finish(cfg, run, last_checkpoint)
    if stop_code:
        say(f"Stopped at step {step}. To go on: --resume {shown(run)}")
        sys.exit(stop_code)
    return run


def dry_run(cfg: Config, process: Process) -> Path:
    """Checks what a run would check and prints what it would take; returns the folder that it would have.
    Data that are not there are no error."""
    device, world_size = process.device, max(process.world_size, cfg.num_gpus)  # --num-gpus are not started
    windows, data_fingerprint = 0, ""

    def say(text: str):
        if process.rank == 0:
            print(text, flush=True)

    refuse(cfg, process, world_size)
    if device.type == "cuda" and process.world_size == 1 and cfg.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus is {cfg.num_gpus}; this machine has {torch.cuda.device_count()}")
    try:
        data = find_data(cfg, process)
    except FileNotFoundError as error:
        say(f"note   the data are not there: {error}")
    else:
        reader = shards.ShardReader(data, "train", cfg.seq_len, cfg.seed)
        say(f"data   {shown(data.folder)}: {reader.num_tokens:,} training tokens")
        if cfg.val_every:
            shards.ShardReader(data, "val", cfg.seq_len, cfg.seed)
        windows, data_fingerprint = reader.num_windows, data.fingerprint()
    saved = checkpoint.load(Path(cfg.resume), cfg.dropout) if cfg.is_resumed else None
    resumed = saved.state if saved else {}
    if resumed:
        for change in check_same(cfg, data_fingerprint or resumed["data"], world_size, resumed):
            say(f"note   {change}")
    model = saved.model if saved else build_model(cfg)
    dtype, why = process.agree(pick_dtype(cfg.dtype, device, resumed.get("dtype")))
    run = find_run(cfg, model.config, process)
    if run.exists() and process.rank == 0:
        checkpoint.unlock(checkpoint.lock(run))  # nobody else has it

    work = workload(cfg, model.config, dtype, device, world_size)
    batch_size, batch_why = cfg.batch_size, ""
    if batch_size == "auto":
        batch_size, batch_why = choose_batch_size(work, model.to("meta"), process)
    say(f"model  {describe(model.config)}; {cfg.optimizer}")
    say(describe_batch(cfg, batch_size, world_size, batch_why))
    say(f"device {device}, {str(dtype).removeprefix('torch.')} ({why})")
    steps = cfg.max_steps - resumed.get("step", 0)
    tokens = steps * cfg.total_batch_tokens
    epochs = f", {tokens / cfg.seq_len / windows:.2f} epochs" if windows else ""
    say(f"steps  {steps:,}, {tokens:,} tokens{epochs}")
    say(plan.describe_memory(work, batch_size, device))
    flops = model.config.flops_per_token(cfg.seq_len)
    say(f"flops  {flops / 1e9:.2f} GFLOP a token (forward and backward), {tokens * flops:.2e} in all")
    say(f"hours  without evaluation, on {world_size} of these GPUs at {plan.MFU:.0%} of the peak:")
    say(plan.describe_hours(tokens * flops, world_size, cfg.dollars_per_gpu_hour))
    say(f"run    {shown(run)}; this was a dry run: nothing is written")
    if process.world_size > 1:
        dist.destroy_process_group()
    return run


def jobs_due(step: int, cfg: Config) -> dict[str, bool]:
    """Which periodic jobs a step begins with: those whose interval divides it; at the end, all of them; with
    --eval-only all evaluations."""

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == cfg.max_steps or cfg.eval_only)

    return {
        "val": due(cfg.val_every),
        "hellaswag": due(cfg.hellaswag_every),
        "sample": due(cfg.sample_every),
        "checkpoint": step > 0
        and not cfg.eval_only
        and (due(cfg.checkpoint_every) or (cfg.checkpoint_minutes > 0 and step == cfg.max_steps)),
    }


def format_seconds(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{int(seconds % 60):02d}s"


def torchrun(processes: int, argv: list[str]):
    """This script in so many processes; exits as they do."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", f"--nproc-per-node={processes}", __file__, *argv])
    except ChildFailedError as error:  # the processes have said why
        sys.exit(max(1, error.get_first_failure()[1].exitcode))
    except SignalException as error:  # it has been passed on to the processes, and they have stopped
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    if "--version" in sys.argv:
        print(versions())
        sys.exit()
    try:
        cfg = parse_args(sys.argv[1:])
        if cfg.num_gpus > 1 and "RANK" not in os.environ and not cfg.dry_run:
            check(cfg, cfg.num_gpus)
            torchrun(cfg.num_gpus, sys.argv[1:])
        else:
            main(cfg)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            machine = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
            print(f"train_gpt2.py{machine}: {error}", file=sys.stderr)
        sys.exit(2)
