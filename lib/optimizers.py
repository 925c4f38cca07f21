"""Muon; and several optimizers that act as one, with the loss scaling that float16 needs.

    optimizers = Optimizers(model, [adamw, Muon(matrices, 3e-3, 0.1, torch.bfloat16)], torch.bfloat16)
    optimizers.set_lr(3e-4)
    optimizers.backward(loss)
    norm = optimizers.clip(1.0)
    optimizers.step()

The order of the calls is the loop's in train_gpt2.py.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from lib.sharded import gather, join, shard_like

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's author (github.com/KellerJordan/Muon)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised (Jordan et al., 2024), scaled to the size of AdamW's steps
    (Liu et al., 2025, arXiv:2502.16982, section 2.2).

    In bfloat16 it takes the steps of torch.optim.Muon with adjust_lr_fn="match_rms_adamw". That one
    orthogonalises a matrix at a time on every process. Here all matrices of a shape are one batch, and the
    processes share it.
    """

    def __init__(
        self,
        matrices: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
    ):
        """dtype: of the run's matrix products. Unless it is bfloat16, Muon's are float32: many CPUs take 60
        times as long in bfloat16."""
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype if dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None):
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                same_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in same_shape.items():
                updates = [self.add_momentum(matrix, group["momentum"]).to(self.dtype) for matrix in matrices]
                steps = orthogonalize_shared(torch.stack([gather(update) for update in updates]))
                for matrix, step in zip(matrices, steps):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(shard_like(step, matrix), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))

    def add_momentum(self, matrix: Any, momentum: float) -> torch.Tensor:
        """The gradient with Nesterov's momentum."""
        if not self.state[matrix]:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffer = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(buffer, momentum)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices to x (n, rows, columns), roughly: singular values near 1, by five
    Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    if is_tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalize_shared(x: torch.Tensor) -> torch.Tensor:
    """`orthogonalize` by all processes, each of which takes a share of the matrices. x must be the same on
    all; so is the result."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalize(x)
    count = -(-x.size(0) // dist.get_world_size())  # matrices of each process; the last ones may have fewer
    mine = x.new_zeros(count, *x.shape[1:])
    share = x[dist.get_rank() * count :][:count]
    mine[: share.size(0)] = orthogonalize(share)
    return join(mine)[: x.size(0)]


class Optimizers:
    """Optimizers of one model. In float16 the loss is scaled up, so that small gradients do not become 0
    (Micikevicius et al., 2018, arXiv:1710.03740)."""

    def __init__(self, model: torch.nn.Module, members: list[torch.optim.Optimizer], dtype: torch.dtype):
        self.parameters, self.members = list(model.parameters()), members
        device_type = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)

    def set_lr(self, lr: float):
        """Sets each group's learning rate: lr times the group's lr_ratio, if it has one."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1.0)

    def backward(self, loss: torch.Tensor):
        """Adds the gradients of the loss to those that are there."""
        self.scaler.scale(loss).backward()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Divides the loss scale out of the gradients, then scales them down to a total norm of max_norm (0:
        never). Returns the norm before."""
        for member in self.members:
            self.scaler.unscale_(member)
        return gather(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf))

    def step(self):
        for member in self.members:
            self.scaler.step(member)

    def update_loss_scale(self):
        """Halves the loss scale after a float16 overflow, doubles it after 2,000 steps without one."""
        self.scaler.update()

    def can_overflow(self) -> bool:
        """Whether gradients that are not finite may be a float16 overflow, which a lower loss scale mends."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def to_state(self) -> dict[str, Any]:
        """The loss scale, as an entry of a checkpoint's state."""
        return {"scaler": self.scaler.state_dict()}

    def load_scaler(self, state: dict[str, Any]):
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)
