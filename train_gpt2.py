"""Stage 2: trains GPT-2.

    python train_gpt2.py demo                # no data, no network, no GPU: about 4 minutes on two cores
    python train_gpt2.py                     # GPT-2 124M on FineWeb-Edu (first: python fineweb.py)
    python train_gpt2.py --num-gpus 8        # the same on 8 GPUs; or torchrun --standalone --nproc_per_node=8
    python train_gpt2.py finetune --dataset-path data/mine     # GPT-2's weights; or --init-from log/<run>
    python train_gpt2.py --resume            # the newest run goes on; or --resume log/<run>, hf://org/name
    python train_gpt2.py --dry-run           # memory, hours, cost (--plan-for 8xH100); --eval-only; --version

On disk: log/<run>/log.txt, one line per fact: <step> <stream> <value>, with streams train val hella lr norm
toks skip spike; settings.json; step_000250/, a checkpoint that Hugging Face loads.

The preset `gpt2` is build-nanogpt's 124M recipe: 19,073 steps of 524,288 tokens, 10 billion in all. Its
author reached a validation loss near 3.07 nats per token and 30.4% on HellaSwag. Small runs chose `gpt2-fast`
(Muon, a higher rate, 4 billion tokens); it was not run at this size.
"""

import lib.startup  # noqa: F401

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

import hellaswag
from lib import checkpoint, cli, parallel, plan, processes, report, runs, shards, stops, tokenizer, trackers
from lib.cli import format_path, knob
from lib.device import allow_cudnn_attention, autocast, pick_dtype, to_device, training_settings, versions
from lib.hub_runs import check_targets
from lib.hub_shards import open_data
from lib.optimizers import Muon, Optimizers
from lib.processes import Process
from lib.run_folder import choose_folder
from model import GPT

# -----------------------------------------------------------------------------
# The recipe: one line per setting. A resumed run may change a `free` setting. It may change a `knob` with
# --override, and a `shape` never. A `start` setting belongs to one start of the run and is not compared.

free, shape, start = (functools.partial(knob, resume=kind) for kind in ("free", "shape", "start"))


# fmt: off
@dataclass(frozen=True)
class Config:
    # data
    dataset_path: cli.PathName = free("data/fineweb-edu-10BT", "folder of token shards, or hf://datasets/org/name")
    cache_gb: float = free(20.0, "disk space for shards from the Hub, under data/hub/", above=0)
    # model
    model_size: str = shape("124M", "124M, 350M, 774M or 1558M, or gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    n_layer: int | None = shape(None, "layers, instead of the size's")
    n_head: int | None = shape(None, "attention heads, instead of the size's")
    n_embd: int | None = shape(None, "channels, instead of the size's")
    seq_len: int = knob(1024, "tokens of context, T", above=0)
    dropout: float = knob(0.0, "dropout probability; 0 for pre-training, 0.1 helps on small data")
    init_from: cli.PathName = free("", "fine-tune these weights: a checkpoint, a size name or a Hub id")
    # optimization
    batch_size: int | Literal["auto"] = free(16, "sequences per micro-step and process", above=0)
    total_batch_tokens: int = knob(524_288, "tokens per optimizer step, by gradient accumulation", above=0)
    learning_rate: float = knob(6e-4, "peak learning rate", above=0, alias="--lr")
    embedding_lr_ratio: float = knob(1.0, "token embedding's rate, as a multiple of --learning-rate", above=0)
    position_lr_ratio: float = knob(1.0, "position embedding's rate, a multiple of --learning-rate", above=0)
    schedule: Literal["cosine", "wsd"] = knob("cosine", "after warm-up: cosine, or flat, then linear")
    decay_ratio: float = knob(0.4, "share of max_steps that wsd's decay takes", at_least=0, at_most=1)
    min_lr_ratio: float = knob(0.1, "the schedule ends at this fraction of the peak", at_least=0, at_most=1)
    max_steps: int = free(19_073, "optimizer steps; changes where the schedule ends", at_least=0)
    warmup_steps: int = knob(715, "steps of linear warm-up", at_least=0)
    weight_decay: float = knob(0.1, "weight decay of matrices and embeddings", at_least=0)
    grad_clip: float = knob(1.0, "maximal gradient norm; 0 for no clipping", at_least=0)
    optimizer: Literal["adamw", "muon"] = shape("adamw", "muon: Muon for the blocks' matrices, else AdamW")
    momentum: float = knob(0.95, "momentum of Muon", at_least=0, at_most=0.999)
    overfit_one_batch: cli.Switch = knob(False, "train on the first step's batch in every step, to find bugs")
    seed: int = knob(1337, "initial weights, data order and dropout", at_least=0)
    # machine
    device: str = free("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: cli.Dtype = knob("auto", "precision of matrix products")
    compile: cli.AutoSwitch = free(None, "torch.compile, by default on GPUs; training goes on if it fails")
    deterministic: bool = free(False, "on a GPU, slower kernels that give the same bytes in every run")
    activation_checkpointing: bool = free(False, "recompute blocks in the backward pass, to save memory")
    fsdp: bool = free(False, "shard weights, gradients and optimizer state over the processes")
    reduce_dtype: Literal["float32", "bfloat16"] = knob("float32", "precision of the gradients' all-reduce")
    num_gpus: int = start(1, "processes on this machine, one per GPU (CPU processes without GPUs)", above=0)
    timeout_seconds: float = free(600.0, "how long processes wait for one that does not answer", above=0)
    # run
    run_name: str = start("", "folder under log/; by default the model and the time")
    like: cli.PathName = start("", "a run whose settings a new run has, but for other flags; no preset then")
    log_dir: cli.PathName = start("", "parent of the run folders; by default log/ beside this script")
    resume: cli.PathName = start("", "a run, checkpoint or hf://org/name; alone: the newest", alone="newest")
    override: cli.Switch = start(False, "resume although settings or data differ from the checkpoint's")
    print_every: int = free(1, "steps between lines on the console; 0 for none", at_least=0)
    max_hours: float = free(0.0, "save and stop (exit code 4) after so many hours; 0 for never", at_least=0)
    eval_only: cli.Switch = start(False, "only evaluate --resume's or --init-from's model; write nothing")
    dry_run: cli.Switch = start(False, "only check, and print what the run would take; write nothing")
    plan_for: str = start("", "a dry run for GPUs that are not here, such as 8xH100 or A100-40GB")
    dollars_per_gpu_hour: float = start(0.0, "price for --dry-run's cost; 0 for none", at_least=0)
    # periodic jobs: every so many steps, and at the end
    val_every: int = free(250, "steps between validation losses; 0 for never", at_least=0)
    val_tokens: int = free(10_485_760, "tokens of the validation split to use", above=0)
    hellaswag_every: int = free(250, "steps between HellaSwag scores; 0 for never", at_least=0)
    hellaswag_limit: int = free(0, "HellaSwag items to use; 0 for all 10,042", at_least=0)
    sample_every: int = free(250, "steps between samples of four texts; 0 for never", at_least=0)
    sample_prompt: str = free("Hello, I'm a language model,", "beginning of the samples")
    checkpoint_every: int = free(5000, "steps between checkpoints; 0 for never", at_least=0)
    checkpoint_minutes: float = free(0.0, "also save every so many minutes; 0 for never", at_least=0)
    keep_last: int = free(0, "checkpoints to keep, beside the best and --keep-every's; 0 for all", at_least=0)
    keep_every: int = free(0, "keep checkpoints whose step this divides; 0 for none", at_least=0)
    hub_repo: str = free("", "upload checkpoints to this model repository of the Hub (org/name)")
    tracker: trackers.Name = free("none", "also send the curves to this tool")
    # numerical faults
    max_bad_steps: int = free(5, "save and stop after so many steps in a row that were not finite", above=0)
    spike_zscore: float = knob(6.0, "standard deviations above the last losses that are a spike", at_least=0)
    skip_spikes: bool = knob(False, "do not change the weights at a spike")
# fmt: on


PRESETS = {
    "gpt2": Config(),
    # Chosen by small runs (log/recipes). The rate is Muon's author's 0.02 (github.com/KellerJordan/Muon), in
    # torch's scaling by 0.2 * sqrt(768). For the line to zero: Bergsma et al., 2025, arXiv:2502.15938.
    "gpt2-fast": Config(optimizer="muon", learning_rate=3.6e-3, max_steps=7_629, warmup_steps=286,
                        schedule="wsd", decay_ratio=0.7, min_lr_ratio=0.0, position_lr_ratio=0.3),
    "demo": Config(
        dataset_path="data/pydocs", n_layer=6, n_head=2, n_embd=64, seq_len=256, batch_size=4,
        total_batch_tokens=2048, optimizer="muon", momentum=0.9, learning_rate=2e-2, embedding_lr_ratio=4.0,
        schedule="wsd", decay_ratio=0.7, min_lr_ratio=0.0, weight_decay=0.0, max_steps=340, warmup_steps=30,
        val_every=85, hellaswag_every=0, sample_every=85, print_every=10, checkpoint_every=170, keep_last=1,
        sample_prompt="This function returns",
    ),
    "finetune": Config(
        init_from="gpt2", dataset_path="data/mine", batch_size=4, total_batch_tokens=32_768,
        learning_rate=3e-5, max_steps=200, warmup_steps=20, val_every=50, hellaswag_every=0, sample_every=50,
    ),
}  # fmt: skip

MOST_USED = ("dataset_path", "model_size", "init_from", "seq_len", "batch_size", "learning_rate", "max_steps",
             "num_gpus", "run_name", "resume")  # fmt: skip
VAL_BATCH_TOKENS = 8192  # per batch of validation


# -----------------------------------------------------------------------------
# optimizers and schedule


def make_optimizers(cfg: Config, model: GPT, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW with betas (0.9, 0.95) and eps 1e-8 (GPT-3: Brown et al., 2020, appendix B). With --optimizer
    muon, Muon (Jordan et al., 2024) for the blocks' matrices, scaled to AdamW's size (Liu et al., 2025).
    Biases and LayerNorm have no weight decay."""
    lr, decay, named = cfg.learning_rate, cfg.weight_decay, dict(model.named_parameters())
    tokens, positions = (named.pop(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    hidden = [n for n, p in named.items() if cfg.optimizer == "muon" and ".h." in n and p.dim() == 2]
    matrices = [named.pop(name) for name in hidden]
    groups = [
        {"params": [tokens], "weight_decay": decay, "lr_ratio": cfg.embedding_lr_ratio},
        {"params": [positions], "weight_decay": decay, "lr_ratio": cfg.position_lr_ratio},
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": decay},  # none with Muon
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [adamw, Muon(matrices, lr, decay, dtype, cfg.momentum)] if matrices else [adamw]


def get_lr(step: int, cfg: Config) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr_ratio of it at max_steps (GPT-3, appendix B),
    or the peak and then a line down (warm-up, stable, decay: Hu et al., 2024, arXiv:2404.06395)."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        progress = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = min(cfg.decay_ratio * cfg.max_steps, cfg.max_steps - cfg.warmup_steps)
        height = min(1.0, max(0, cfg.max_steps - step) / max(1.0, decay_steps))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * height)


# -----------------------------------------------------------------------------
# validation and samples


@dataclass
class Setup:
    """Settings, model and data, as training, --eval-only and --dry-run share them."""

    cfg: Config
    process: Process
    model: GPT
    state: dict[str, Any]  # of the resumed checkpoint, else empty
    optimizer_tensors: dict[str, torch.Tensor]
    dtype: torch.dtype
    folder: Path  # of the run; with --eval-only, the model's
    data: shards.Folder | None  # None if a dry run finds none
    train_data: shards.ShardReader | None
    entropy: float = math.nan
    hellaswag_items: list[dict] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def val_data(self) -> shards.ShardReader:
        assert self.data
        return shards.ShardReader(self.data, "val", self.cfg.seq_len, self.cfg.seed)

    @property
    def autocast(self) -> torch.autocast:
        # A cache of cast weights would take the memory that activation checkpointing spares.
        return autocast(self.process.device, self.dtype, cache=not self.cfg.activation_checkpointing)


@torch.no_grad()
def validation_loss(model: GPT, reader: shards.ShardReader, val_tokens: int, process: Process) -> float:
    """Mean loss in nats per token over the first val_tokens of the validation split. The processes divide
    fixed batches among them, so the figure does not depend on their number."""
    seq_len = reader.seq_len
    windows = min(reader.num_windows, max(1, val_tokens // seq_len))
    positions, rows = range(0, windows * seq_len, seq_len), max(1, VAL_BATCH_TOKENS // seq_len)
    mine, losses = range(0, windows, rows)[process.rank :: process.world_size], []
    for i in tqdm(mine, "validation", leave=False, disable=process.rank > 0 or None):
        x, y = (to_device(t, process.device) for t in reader.read(positions[i : i + rows]))
        losses.append(model(x, y))  # it stays on the device: a GPU would idle while each is read
    values = torch.stack(losses).tolist() if losses else []
    total = sum(loss * len(positions[i : i + rows]) for loss, i in zip(values, mine))  # exact: in float64
    return process.all_reduce(total)[0] / windows


def print_samples(model: GPT, cfg: Config, step: int, device: torch.device):
    """Prints four continuations of the sample prompt, by its own generator; from new weights a short one."""
    count, length = (4, 48) if step or cfg.init_from else (1, 12)
    ids = tokenizer.encode(cfg.sample_prompt) or [tokenizer.END_OF_TEXT]
    generator = torch.Generator(device=device).manual_seed(cfg.seed + step)
    prompts = torch.tensor([ids] * count, device=device)
    rows = model.generate(prompts, length, temperature=0.8, top_k=50, generator=generator)
    for row in rows[:, len(ids) :].tolist():
        report.print_sample(cfg.sample_prompt + tokenizer.decode_until_end(row))


def evaluate(setup: Setup, model: GPT, step: int, due: set[str]) -> dict[str, float]:
    """Runs the evaluations that are due; returns their figures by the log's streams."""
    cfg, process, figures = setup.cfg, setup.process, {}

    def note(stream: str, figure: float, *remarks: str):
        figures[stream] = figure
        process.print(report.describe_evaluation(step, cfg.max_steps, stream, figure, remarks))

    whole = parallel.unshard(model)
    with setup.autocast, allow_cudnn_attention(False):
        if "val" in due:
            loss = validation_loss(whole, setup.val_data, cfg.val_tokens, process)
            perplexity = [f"perplexity {math.exp(loss):,.1f}"] if loss < 20 else []
            note("val", loss, *perplexity, f"unigram entropy {setup.entropy:.2f}")
        if "hellaswag" in due and (items := setup.hellaswag_items):
            scores = hellaswag.evaluate(whole, items, process, protocols=("completion",))
            note("hella", scores["completion"]["acc_norm"], f"{len(items):,} items")
        if "sample" in due and process.rank == 0:
            try:
                print_samples(whole, cfg, step, process.device)
            except ValueError as error:  # the logits are not finite; training goes on
                print(f"sample | none: {error}", flush=True)
    return figures


# -----------------------------------------------------------------------------
# before the first step


def prepare(cfg: Config, process: Process, found: checkpoint.Found | None) -> Setup:
    """Checks the settings, opens the data, loads or builds the model and chooses the run's folder. It writes
    nothing there. Raises ValueError or OSError for whatever would stop the run later."""
    writes, device = not (cfg.dry_run or cfg.eval_only), process.device
    world_size = max(process.world_size, cfg.num_gpus) if cfg.dry_run else process.world_size
    runs.check_settings(cfg, world_size, device.type)
    if process.rank == 0 and not cfg.eval_only:
        check_targets(cfg, is_new=found is None)
    data = None
    try:
        data = open_data(cfg.dataset_path, 1e9 * cfg.cache_gb, process, may_make=writes)
    except FileNotFoundError as error:
        if not cfg.dry_run:
            raise
        process.print(f"note   the data are not there: {error}")
    train_data = shards.ShardReader(data, "train", cfg.seq_len, cfg.seed) if data else None
    loaded = checkpoint.load(found.folder, cfg.dropout, found.state) if found else None
    state, tensors = (loaded.state, loaded.optimizer) if loaded else ({}, {})
    changes = runs.compare_settings(cfg, found, data, process, world_size)
    model = loaded.model if loaded else checkpoint.build_model(cfg)
    if cfg.init_from and not loaded and cfg.seq_len == model.config.block_size < Config.seq_len:
        changes.append(f"--seq-len is {cfg.seq_len}, the context of {cfg.init_from}")
    folder = choose_folder(cfg, model.config, process)
    dtype, why = process.broadcast(pick_dtype(cfg.dtype, device, state.get("dtype")))
    setup = Setup(cfg, process, model, state, tensors, dtype, folder, data, train_data)
    if data and cfg.val_every:
        reader = setup.val_data  # raises ValueError if there is none
        setup.entropy = math.nan if cfg.dry_run else reader.unigram_entropy(cfg.val_tokens)
    process.print(report.describe_setup(setup, why))
    if cfg.hellaswag_every and not cfg.dry_run:
        is_needed = cfg.eval_only and runs.find_jobs(cfg) <= {"hellaswag", "checkpoint"}
        setup.hellaswag_items = hellaswag.load_for_training(process, cfg.hellaswag_limit, is_needed)
    for change in changes:
        process.print(f"note   {change}")
    return setup


# -----------------------------------------------------------------------------
# training


def train(setup: Setup, stack: contextlib.ExitStack) -> Path:
    """Trains to max_steps; returns the run's folder. A run that stops early exits with a code of stops.py."""
    cfg, process = setup.cfg, setup.process
    state, folder, train_data, model_config = setup.state, setup.folder, setup.train_data, setup.model.config
    device, rank, world_size = process.device, process.rank, process.world_size
    assert train_data
    raw_model = parallel.place(setup.model, process, cfg.fsdp, cfg.reduce_dtype)
    raw_model.recompute = cfg.activation_checkpointing
    batch_size, why = plan.choose_batch_size(cfg, raw_model, setup.dtype, process)
    cfg = dataclasses.replace(cfg, batch_size=batch_size, run_name=folder.name)  # as it is saved
    sequences = cfg.total_batch_tokens // cfg.seq_len  # per step
    micro_steps = sequences // (batch_size * world_size)  # micro-steps per step
    optimizers = Optimizers(raw_model, make_optimizers(cfg, raw_model, setup.dtype), setup.dtype)
    if state:
        checkpoint.load_optimizers(raw_model, optimizers.members, setup.optimizer_tensors)
        optimizers.load_scaler(state["scaler"])
    setup.optimizer_tensors = {}  # they have been copied

    progress = runs.Progress.from_state(state, folder.name)
    process.print(report.describe_run(cfg, batch_size, why, world_size, folder, state.get("step")))
    trial = tuple(t.to(device) for t in train_data.batch(progress.step, 0, batch_size, sequences))
    with plan.refuse_too_large_batches(cfg, raw_model, setup.dtype, process, bool(state)):
        model = parallel.wrap(raw_model, trial, setup.autocast, process, cfg, micro_steps)
    about = runs.describe(cfg, model_config, train_data, setup.dtype, world_size)
    run = stack.enter_context(runs.Run(folder, about, process, state.get("step")))
    run.start_tracker(progress.tracker_id)
    watch = stops.Watch(process, cfg.max_hours, cfg.checkpoint_minutes, cfg.max_bad_steps)
    stack.callback(watch.signals.restore)
    flops, jobs = model_config.flops_per_token(cfg.seq_len), runs.find_jobs(cfg) - {"checkpoint"}
    console = report.Console(cfg, flops, device, setup.dtype, world_size, jobs)
    first_step, pin = progress.step, device.type == "cuda"
    steps = [0 if cfg.overfit_one_batch else step for step in range(first_step, cfg.max_steps)]
    batches = train_data.batches(steps, micro_steps, batch_size, sequences, rank, world_size, pin_memory=pin)

    # ---- the loop: max_steps + 1 times; the last time only evaluates and saves
    for step in range(first_step, cfg.max_steps + 1):
        due = runs.find_due(step, cfg)
        if state and step == first_step:  # a stopped run saved this step without its evaluations
            due = set() if progress.evaluated else due - {"checkpoint"}
        if watch.exit_code:
            due = {"checkpoint"}
        elif watch.wants_checkpoint:
            due.add("checkpoint")
        progress.begin_step(step)
        if due - {"checkpoint"}:
            figures = evaluate(setup, raw_model, step, due)
            progress.note_evaluation(figures)
            run.log(step, **figures)
        if "checkpoint" in due:
            progress.evaluated = not watch.exit_code
            run.save(step, raw_model, optimizers, progress)
            watch.note_checkpoint()
        if watch.exit_code or step == cfg.max_steps:
            break

        # ---- one training step
        begin = time.perf_counter()
        model.train()
        torch.manual_seed((cfg.seed * 2**40 + step * 2**12 + rank) % 2**63)  # of dropout, per step
        lr = get_lr(step, cfg)
        optimizers.set_lr(lr)
        train_loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            x, y = (t.to(device, non_blocking=True) for t in next(batches))
            # DDP averages the gradients over the processes in the last micro-step, FSDP in each.
            parallel.set_gradient_sync(model, is_last=micro_step == micro_steps - 1)
            with setup.autocast:
                loss = model(x, y)
            # Gradients add up; dividing makes their sum the mean over all micro-steps.
            loss = loss / micro_steps
            train_loss += loss.detach()
            optimizers.backward(loss)
        norm = optimizers.clip(cfg.grad_clip)
        # Beside the gradients', one all-reduce shares the loss and the votes to stop. Here the CPU waits for
        # the GPU, once per step: a bad step must be known before it changes the weights.
        loss_sum, *votes = process.all_reduce(train_loss, *watch.votes())
        mean_loss, norm = loss_sum / world_size, norm.item()
        verdict = stops.judge(mean_loss, norm, progress.recent_losses, cfg.spike_zscore, cfg.skip_spikes)
        if verdict.is_healthy:
            optimizers.step()
        optimizers.update_loss_scale()  # after a skipped step, too: an overflow lowers it
        parallel.zero_gradients(model)
        seconds = time.perf_counter() - begin

        # ---- log
        toks = cfg.total_batch_tokens / seconds
        run.log(step, train=mean_loss, lr=lr, norm=norm, toks=toks, **verdict.streams)
        for line in verdict.explain():
            process.print(f"{report.format_step(step, cfg.max_steps)} | {line}")
        progress.note_step(mean_loss, verdict, optimizers.can_overflow())
        watch.tally(votes, progress.bad_steps)
        if watch.exit_code:
            process.print(f"stopping: {watch.reason}")
        run.print_news(step)
        if line := console.describe_step(step, mean_loss, lr, norm, seconds):
            process.print(line)

    run.print_news(step, wait=True)
    run.close_tracker(watch.exit_code)  # before the others may end: torchrun gives rank 0 no time after that
    process.barrier()  # if rank 0 failed to write its last checkpoint, it is gone, and the others fail here
    watch.signals.restore()
    del model  # before the process group: see disconnect
    process.disconnect()
    if rank == 0:
        run.finish(watch.exit_code)
    if watch.exit_code:
        process.print(f"Stopped at step {step}. To go on:\n  {report.suggest_resume(folder)}")
        sys.exit(watch.exit_code)
    return folder


# -----------------------------------------------------------------------------
# evaluating alone, planning, main


def evaluate_only(setup: Setup) -> Path:
    """Evaluates a checkpoint or --init-from's weights once; writes nothing."""
    cfg, process = setup.cfg, setup.process
    model = parallel.place(setup.model, process, cfg.fsdp, cfg.reduce_dtype)
    process.print(f"only evaluating {format_path(setup.folder)}; nothing is written")
    setup.optimizer_tensors = {}  # they are not needed
    evaluate(setup, model, setup.state.get("step", 0), runs.find_jobs(cfg))
    process.barrier()
    return setup.folder


def dry_run(setup: Setup) -> Path:
    """Prints what a run would take; returns the folder that it would have."""
    cfg, process = setup.cfg, setup.process
    steps = cfg.max_steps - setup.state.get("step", 0)
    epoch = setup.train_data.num_windows * cfg.seq_len if setup.train_data else 0
    process.print(plan.describe(cfg, setup.model.to("meta"), setup.dtype, process, steps, epoch))
    process.print(f"run    {format_path(setup.folder)}; this was a dry run: nothing is written")
    return setup.folder


def read_flags(argv: list[str], base: Config | None = None) -> Config:
    """A command line as a configuration: flags over base, or over the preset that is its first word."""
    cfg = cli.parse(Config, __doc__, argv, base, PRESETS, MOST_USED)
    if not cfg.init_from or base:
        return cfg
    return cli.parse(Config, __doc__, argv, base, checkpoint.adopt_shape(PRESETS, cfg.init_from), MOST_USED)


def parse_args(argv: list[str]) -> tuple[Config, checkpoint.Found | None]:
    """The configuration of a command line, and the checkpoint it resumes. A resumed run starts from the saved
    settings, one with --like from another run's."""
    cfg = read_flags(argv)
    if cfg.like:
        like = runs.read_like(cfg, preset=argv[0] if argv[0] in PRESETS else "")
        if cfg.init_from:
            like = checkpoint.adopt_shape({"": like}, cfg.init_from)[""]
        cfg = read_flags(argv, like)
    cfg = plan.apply_plan_for(cfg)
    if found := runs.find_checkpoint(cfg):
        cfg = runs.set_location(read_flags(argv, runs.read_settings(cfg, found)), found)
    return cfg, found


def main(cfg: Config, found: checkpoint.Found | None = None) -> Path:
    """Does what cfg says; returns the run's folder. found: cfg.resume's checkpoint, if verified already."""
    cfg = plan.apply_plan_for(cfg)
    found = found or runs.find_checkpoint(cfg)
    cfg = runs.set_location(cfg, found)
    connection = processes.connect(cfg.device, cfg.timeout_seconds, spare_memory=cfg.fsdp)
    with connection as process, contextlib.ExitStack() as stack:
        stack.enter_context(training_settings(process.device, cfg.deterministic))
        setup = prepare(cfg, process, found)
        if cfg.dry_run:
            return dry_run(setup)
        return evaluate_only(setup) if cfg.eval_only else train(setup, stack)


def run_script():
    """The command line: --version, a launch of several processes, or main."""
    if "--version" in sys.argv:
        print(versions())
        return
    cfg, found = parse_args(sys.argv[1:])
    if cfg.num_gpus > 1 and "RANK" not in os.environ and not (cfg.dry_run or cfg.plan_for):
        runs.check_settings(cfg, cfg.num_gpus)
        processes.launch(__file__, cfg.num_gpus, sys.argv[1:])
    else:
        main(cfg, found)


if __name__ == "__main__":
    cli.run(run_script, outlives_console=True)
