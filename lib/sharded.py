"""Tensors of which FSDP has given each process some rows: the whole from the parts, a part of a whole.

    whole = gather(weight)               # on every process; any other tensor is returned as it is
    part = shard_like(whole, weight)     # this process's rows

Not by DTensor.full_tensor, which can crash under gloo (torch 2.13, ProcessGroupGloo::runLoop): two threads
write the last operation's name into one string without a lock. The name that full_tensor has,
ALLGATHER_COALESCED, is too long for the string itself. Its memory is on the heap and can be freed twice.
"""

from typing import Any

import torch
import torch.distributed as dist


def gather(x: Any) -> torch.Tensor:
    """The whole of a tensor that FSDP has sharded, or of a sum or norm that is still spread over the
    processes. All of them must call it."""
    if not hasattr(x, "full_tensor"):
        return x
    if not x.placements[0].is_shard():
        return x.full_tensor()  # an all-reduce
    mesh, mine = x.device_mesh, x.to_local()
    rows = -(-x.size(0) // mesh.size())  # of each process; the last ones may have fewer
    padded = mine.new_zeros(rows, *x.shape[1:])
    padded[: mine.size(0)] = mine
    return join(padded, mesh.get_group())[: x.size(0)]


def join(mine: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The rows of all processes of a group, in the order of their ranks; each has as many."""
    parts = mine.new_empty(mine.size(0) * dist.get_world_size(group), *mine.shape[1:])
    # torch 2.13 has a new name for it; 2.11 has only the old one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(parts, mine, group)
    return parts


def shard_like(x: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This process's part of x, if FSDP has sharded the parameter; else x."""
    if not hasattr(parameter, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
