"""Wraps the network for training in torch.compile, DDP or FSDP, and says when gradients are averaged.

    raw_model = parallel.place(model, process, fsdp, reduce_dtype)       # on the device; FSDP shards it here
    model = parallel.wrap(raw_model, batch, autocast, process, cfg, micro_steps)
    for micro_step in range(micro_steps):
        parallel.set_gradient_sync(model, is_last=micro_step == micro_steps - 1)

Evaluation, samples and checkpoints use raw_model, whose parameter names have no prefix.
"""

import dataclasses
import time
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lib.processes import Process
from lib.sharded import gather
from model import GPT

Batch = tuple[torch.Tensor, ...]  # inputs and targets


def place(model: GPT, process: Process, fsdp: bool, reduce_dtype: str) -> GPT:
    """The model on the process's device: all of it or, with fsdp, this process's share."""
    if fsdp and process.world_size > 1:
        return wrap_fsdp(model, process, reduce_dtype)
    return model.to(process.device)


def wrap(
    model: GPT, batch: Batch, autocast: torch.autocast, process: Process, cfg: Any, micro_steps: int
) -> torch.nn.Module:
    """The module to train: the model, compiled if asked, inside DDP if there are several processes and it is
    not sharded. The batch is used for trial passes, which leave no trace. cfg: train_gpt2.py's settings."""
    module: torch.nn.Module = model
    if cfg.compile or (cfg.compile is None and process.device.type != "cpu"):  # on CPUs it gains nothing
        process.print("note   compiling, which may take a minute; --no-compile does without")
        torch._dynamo.config.optimize_ddp = False  # one graph; ours gains nothing when DDP's buckets cut it
        if is_sharded(model):
            outcome = compile_blocks(model, batch, autocast)
        else:
            module, outcome = compile_model(model, batch, autocast)
        process.print(f"note   {outcome}")
    module.train()
    # On a GPU these passes show whether its memory suffices. A second micro-step finds the first gradients.
    passes = min(micro_steps, 2) if process.device.type == "cuda" else 0
    if process.world_size > 1 and not is_sharded(model):
        module = wrap_ddp(module, cfg.reduce_dtype, process.device)
        # After its first backward pass DDP arranges its buckets anew, and then adds gradients up in another
        # order. These passes are no steps of the run: a resumed run must equal an uninterrupted one.
        run_pass(module, batch, autocast)
        module.zero_grad(set_to_none=True)
        passes = 1
    for _ in range(passes):
        run_pass(module, batch, autocast)
    zero_gradients(module)
    return module


def run_pass(module: torch.nn.Module, batch: Batch, autocast: torch.autocast):
    """A forward and a backward pass."""
    with autocast:
        loss = module(*batch)
    loss.backward()


def compile_model(model: GPT, batch: Batch, autocast: torch.autocast) -> tuple[torch.nn.Module, str]:
    """torch.compile(model) if one forward and backward pass succeeds, else the model; and what happened."""
    fast = torch.compile(model.train())
    begin = time.perf_counter()
    try:
        run_pass(fast, batch, autocast)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing or broken compiler raises errors of many kinds
        torch._dynamo.reset()
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return model, f"torch.compile does not work here ({reason}); training goes on without it"
    finally:
        model.zero_grad(set_to_none=True)
    return fast, f"compiled in {time.perf_counter() - begin:.0f} s"  # type: ignore[return-value]


def compile_blocks(model: GPT, batch: Batch, autocast: torch.autocast) -> str:
    """Compiles each block of a sharded model by itself, because FSDP gathers weights between blocks; returns
    what happened. The trial is a whole model of one layer: if it fails on one process, no other waits."""
    trial = GPT(dataclasses.replace(model.config, n_layer=1)).to(batch[0].device)
    fast, outcome = compile_model(trial, batch, autocast)
    for block in model.blocks if fast is not trial else ():
        block.forward = torch.compile(block.forward)
    return outcome


def wrap_ddp(model: torch.nn.Module, reduce_dtype: str, device: torch.device) -> DistributedDataParallel:
    """The model with gradients averaged over all processes (all-reduce), in buckets. A gradient is a view of
    its bucket. In eager mode buckets travel during the backward pass; a compiled backward pass is one graph,
    and they travel after it."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    devices = [device.index] if device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if reduce_dtype == "bfloat16":  # a lambda, because DDP refuses this hook by name on a CPU; gloo can do it
        ddp.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    return ddp


def wrap_fsdp(model: GPT, process: Process, reduce_dtype: str) -> GPT:
    """The model with weights, gradients and optimizer state sharded over all processes (ZeRO-3: Rajbhandari
    et al., 2020, arXiv:1910.02054). A block's weights are gathered while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(process.device.type, (process.world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, reduce_dtype))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)  # type: ignore[return-value]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP has sharded the model."""
    # fully_shard gives the model this method.
    return hasattr(model, "set_requires_gradient_sync")


def unshard(model: GPT) -> GPT:
    """The model in evaluation mode: itself or, if it is sharded, a plain copy. All ranks must make the copy.
    Its forward pass needs no other rank, so ranks may score different numbers of items."""
    if not is_sharded(model):
        return model.eval()
    with torch.device("meta"):
        whole = GPT(model.config)
    weights: dict[str, Any] = model.state_dict()
    whole.load_state_dict({name: gather(weight) for name, weight in weights.items()}, assign=True)
    return whole.eval()


def set_gradient_sync(model: torch.nn.Module, is_last: bool):
    """Under DDP, exchanges gradients in the next backward pass only if its micro-step is the step's last.
    FSDP does so in each: until then it would keep whole gradients, for which there is no memory."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = is_last


def zero_gradients(model: torch.nn.Module):
    """Frees the gradients. Under DDP it sets them to zero instead, so that they remain views of its buckets:
    freed ones would be accumulated elsewhere and copied there."""
    model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
