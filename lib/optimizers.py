"""Several optimizers that act as one, with the loss scaling that float16 needs.

    optimizers = Optimizers(model, [adamw, muon], torch.bfloat16)
    optimizers.set_lr(3e-4)
    optimizers.backward(loss)
    norm = optimizers.clip(1.0)
    optimizers.step()

The order of the calls is the loop's in train_gpt2.py.
"""

import math
from typing import Any

import torch


class Optimizers:
    """Optimizers of one model. In float16 the loss is scaled up, so that small gradients do not become 0
    (Micikevicius et al., 2018, arXiv:1710.03740)."""

    def __init__(self, model: torch.nn.Module, members: list[torch.optim.Optimizer], dtype: torch.dtype):
        self.parameters, self.members = list(model.parameters()), members
        device_type = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)

    def set_lr(self, lr: float):
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = lr

    def backward(self, loss: torch.Tensor):
        """Adds the gradients of the loss to those that are there."""
        self.scaler.scale(loss).backward()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Divides the loss scale out of the gradients, then scales them down to a total norm of max_norm (0:
        never). Returns the norm before."""
        for member in self.members:
            self.scaler.unscale_(member)
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards under FSDP

    def step(self):
        for member in self.members:
            self.scaler.step(member)

    def update_loss_scale(self):
        """Halves the loss scale after a float16 overflow, doubles it after 2,000 steps without one."""
        self.scaler.update()

    def zero_grad(self):
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def can_overflow(self) -> bool:
        """Whether gradients that are not finite may be a float16 overflow, which a lower loss scale mends."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def to_state(self) -> dict[str, Any]:
        """The loss scale, as an entry of a checkpoint's state."""
        return {"scaler": self.scaler.state_dict()}

    def load_scaler(self, state: dict[str, Any]):
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)
