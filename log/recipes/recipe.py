"""Trains one small GPT-2 by one recipe, to count the tokens that the recipe needs. sweep.py repeats it.

    python -m log.recipes.recipe --out run.json --tokens 819_200 --optimizer muon --lr 4e-3 --zero-projections

The loop, the data order and the optimizers are train_gpt2.py's, without what a long run needs. Each technique
is a flag, off by default. All of them leave an exact GPT-2. A duration is a fraction of the run's tokens. On
disk: one JSON file (settings, losses, versions).
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.optim.swa_utils import AveragedModel

from lib import device, files, shards
from lib.optimizers import NEWTON_SCHULZ, Muon
from model import GPT, GPTConfig

# Five polynomials in place of one. Each is the best one for the singular values that the previous ones leave
# (Polar Express: Amsel et al., 2025, arXiv:2505.16932, algorithm 1, with its safety factor 1.01).
POLAR_EXPRESS = [
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
]
POINTS = 60  # of the curve of training losses
MICRO_BATCH = 16  # windows at a time


@dataclass(frozen=True)
class Recipe:
    # what is the same for all recipes of a comparison
    tokens: int = 1_024_000  # of the run
    data: str = "data/recipes"
    val_tokens: int = 131_072
    seed: int = 1
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    seq_len: int = 256
    # the recipe
    optimizer: Literal["adamw", "muon"] = "muon"
    batch_tokens: int = 4096  # per step
    lr: float = 4e-3  # peak
    warmup_ratio: float = 0.04
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_ratio: float = 0.4  # wsd
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    # learning rates of AdamW's groups, as multiples of lr; weight decay goes with them
    embedding_lr_ratio: float = 1.0
    position_lr_ratio: float = 1.0
    vector_lr_ratio: float = 1.0  # gains and biases
    rest_decay_ratio: float | None = None  # wsd: decay_ratio of these groups, if it is another
    # AdamW of the token embedding
    embedding_beta1: float = 0.9
    embedding_beta2: float = 0.95
    embedding_eps: float = 1e-8
    # Muon
    split_qkv: bool = False  # query, key and value are matrices of their own
    normuon: bool = False  # Li et al., 2025, arXiv:2510.05491
    polar_express: bool = False
    cautious: bool = False  # decay only where it agrees with the step (Chen et al., 2025, arXiv:2510.12402)
    momentum: float = 0.95
    momentum_warmup: float = 0.0  # from 0.85
    momentum_cooldown: float = 0.0  # to 0.85
    # the rest
    average: float = 0.0  # share of the run, at its end, over whose steps the weights are averaged
    zero_projections: bool = False  # the layers that write to the residual stream begin at zero
    grow_sequences: bool = False  # seq_len/4, seq_len/2, then seq_len, for a third of the tokens each
    grow_batch: bool = False  # the same of batch_tokens

    def __post_init__(self):
        unit = self.seq_len * (4 if self.grow_batch else 1)
        if self.batch_tokens % unit or self.tokens % self.batch_tokens:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, tokens {self.tokens}: the first must be a multiple of "
                f"{unit}, the second one of the first"
            )


# -----------------------------------------------------------------------------
# optimizers


class TrialMuon(Muon):
    """train_gpt2.py's Muon with the recipe's techniques. Its steps equal Muon's if there are none."""

    def __init__(self, matrices: Mapping[str, torch.Tensor], recipe: Recipe, dtype: torch.dtype):
        super().__init__(matrices.values(), recipe.lr, recipe.weight_decay, dtype, recipe.momentum)
        self.recipe, self.names = recipe, {p: name for name, p in matrices.items()}

    @torch.no_grad()
    def step(self, closure: None = None):
        (group,) = self.param_groups
        for matrix in group["params"]:
            update = self.add_momentum(matrix, group["momentum"])
            is_split = self.recipe.split_qkv and "c_attn" in self.names[matrix]
            parts = update.chunk(3) if is_split else [update]
            update = torch.cat([self.orthogonalize(part) for part in parts])
            if self.recipe.normuon:
                update = self.normalize_rows(matrix, update)
            shrunk = matrix * (update * matrix > 0) if self.recipe.cautious else matrix
            matrix.sub_(shrunk, alpha=group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"])

    def orthogonalize(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest semi-orthogonal matrix, scaled to the size of AdamW's steps."""
        scale, y = 0.2 * math.sqrt(max(x.shape)), x.to(self.dtype)
        y = y.mT if x.size(0) > x.size(1) else y
        y = y / (y.norm() * (1.01 if self.recipe.polar_express else 1)).clamp(min=1e-7)
        for a, b, c in POLAR_EXPRESS if self.recipe.polar_express else [NEWTON_SCHULZ] * 5:
            gram = y @ y.mT
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        return scale * (y.mT if x.size(0) > x.size(1) else y).float()

    def normalize_rows(self, matrix: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Divides each row by the root of its mean square over the last steps. As in the authors' code, the
        matrix keeps its norm."""
        square, state = update.square().mean(1, keepdim=True), self.state[matrix]
        if "rows" not in state:
            state["rows"] = torch.zeros_like(square)
        # It begins at zero without a correction. The same factor for all rows does not change the result.
        rows = update / (state["rows"].lerp_(square, 0.05).sqrt() + 1e-10)
        return rows * (update.norm() / rows.norm().clamp(min=1e-10))  # an update may be zero


def make_optimizers(recipe: Recipe, model: GPT, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW in groups, and Muon for the blocks' matrices if the recipe says so. Each group has its own
    lr_ratio and decay_ratio."""
    named = dict(model.named_parameters())
    wte, wpe = (named.pop(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    matrices = {name: p for name, p in named.items() if p.dim() == 2}
    vectors = [p for p in named.values() if p.dim() < 2]
    rest = recipe.decay_ratio if recipe.rest_decay_ratio is None else recipe.rest_decay_ratio
    of_matrices = dict(lr_ratio=1.0, decay_ratio=recipe.decay_ratio)
    of_embedding = dict(betas=(recipe.embedding_beta1, recipe.embedding_beta2), eps=recipe.embedding_eps)
    groups: list[dict[str, Any]] = [
        dict(params=[wte], lr_ratio=recipe.embedding_lr_ratio, decay_ratio=rest, **of_embedding),
        dict(params=[wpe], lr_ratio=recipe.position_lr_ratio, decay_ratio=rest),
        dict(params=vectors, lr_ratio=recipe.vector_lr_ratio, decay_ratio=rest, weight_decay=0.0),
    ]
    if recipe.optimizer == "adamw":
        groups.append(dict(params=list(matrices.values()), **of_matrices))
    adamw = torch.optim.AdamW(
        groups, recipe.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=recipe.weight_decay, fused=True
    )
    if recipe.optimizer == "adamw":
        return [adamw]
    muon = TrialMuon(matrices, recipe, dtype)
    muon.param_groups[0].update(of_matrices)
    return [adamw, muon]


# -----------------------------------------------------------------------------
# schedules: a function of seen, the tokens before the step


def get_lr(recipe: Recipe, seen: int, step_tokens: int, decay_ratio: float) -> float:
    """train_gpt2.py's schedule, in tokens."""
    warmup = recipe.warmup_ratio * recipe.tokens
    if seen < warmup:
        return recipe.lr * min(1.0, (seen + step_tokens) / warmup)
    if recipe.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * (seen - warmup) / (recipe.tokens - warmup)))
    else:
        decay = max(step_tokens, min(decay_ratio * recipe.tokens, recipe.tokens - warmup))
        height = min(1.0, (recipe.tokens - seen) / decay)
    return recipe.lr * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * height)


def get_momentum(recipe: Recipe, progress: float) -> float:
    up = min(1.0, progress / recipe.momentum_warmup) if recipe.momentum_warmup else 1.0
    down = min(1.0, (1 - progress) / recipe.momentum_cooldown) if recipe.momentum_cooldown else 1.0
    return 0.85 + (recipe.momentum - 0.85) * min(up, down)


def get_growth(progress: float) -> float:
    """A quarter, a half and all, for a third of the tokens each."""
    return (0.25, 0.5, 1.0)[min(2, int(3 * progress))]


# -----------------------------------------------------------------------------
# data and loss


def read_windows(recipe: Recipe, reader: shards.ShardReader, first: int, count: int) -> Iterator[tuple]:
    """The run's windows first to first + count, some at a time: inputs and targets, each (B, T)."""
    for begin in range(first, first + count, MICRO_BATCH):
        numbers = range(begin, min(begin + MICRO_BATCH, first + count))
        yield reader.read([reader.find_position(n) for n in numbers])


@torch.no_grad()
def validation_loss(
    recipe: Recipe, model: torch.nn.Module, reader: shards.ShardReader, autocast: Any
) -> float:
    windows = min(recipe.val_tokens // recipe.seq_len, reader.num_windows)
    total = 0.0
    model.eval()
    for begin in range(0, windows, MICRO_BATCH):
        numbers = range(begin, min(begin + MICRO_BATCH, windows))
        x, y = reader.read([n * recipe.seq_len for n in numbers])
        with autocast:
            total += model(x, y).item() * len(numbers)
    model.train()
    return total / windows


def make_model(recipe: Recipe) -> GPT:
    torch.manual_seed(recipe.seed)
    shape = GPTConfig(recipe.seq_len, n_layer=recipe.n_layer, n_head=recipe.n_head, n_embd=recipe.n_embd)
    model = GPT(shape)
    if recipe.zero_projections:
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                torch.nn.init.zeros_(p)
    return model


# -----------------------------------------------------------------------------
# a run


def train(recipe: Recipe) -> dict[str, Any]:
    """Trains, and returns the final validation loss ("val") and the training losses by tokens ("train"). If
    weights are averaged, "val" is the loss of the average, "last" that of the last step's weights."""
    cpu = device.pick_device("cpu")
    dtype, _ = device.pick_dtype("auto", cpu)
    autocast = device.autocast(cpu, dtype)
    train_data, val_data = (
        shards.ShardReader(recipe.data, split, recipe.seq_len, recipe.seed) for split in ("train", "val")
    )
    if recipe.tokens > train_data.num_windows * recipe.seq_len:
        raise ValueError(f"{recipe.data} has {train_data.num_tokens:,} tokens, the run {recipe.tokens:,}")
    model = make_model(recipe)
    optimizers = make_optimizers(recipe, model, dtype)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    average, curve, seen, begin = AveragedModel(model), [], 0, time.time()
    while seen < recipe.tokens:
        growth = get_growth(seen / recipe.tokens)
        windows = int(recipe.batch_tokens * (growth if recipe.grow_batch else 1)) // recipe.seq_len
        seq_len = int(recipe.seq_len * (growth if recipe.grow_sequences else 1))
        loss_sum = 0.0
        for x, y in read_windows(recipe, train_data, seen // recipe.seq_len, windows):
            with autocast:
                loss = model(x.reshape(-1, seq_len), y.reshape(-1, seq_len))
            loss = loss * (len(x) / windows)
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_tokens = windows * recipe.seq_len
        for group in groups:
            group["lr"] = get_lr(recipe, seen, step_tokens, group["decay_ratio"]) * group["lr_ratio"]
        if recipe.optimizer == "muon":
            groups[-1]["momentum"] = get_momentum(recipe, seen / recipe.tokens)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += step_tokens
        curve.append((seen, loss_sum))
        if recipe.average and seen > (1 - recipe.average) * recipe.tokens:
            average.update_parameters(model)
    seconds = time.time() - begin
    last = validation_loss(recipe, model, val_data, autocast)
    val = validation_loss(recipe, average.module, val_data, autocast) if recipe.average else last
    machine = dict(dtype=str(dtype), torch=torch.__version__, seconds=round(seconds))
    return dict(val=val, last=last, **machine, train=thin(curve))


def thin(curve: list[tuple[int, float]]) -> list[list[float]]:
    """Means of neighbouring steps: about POINTS pairs of tokens and loss."""
    size = max(1, len(curve) // POINTS)
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [[part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)] for part in parts]


def main(recipe: Recipe, out: Path):
    result = train(recipe)
    text = json.dumps(dict(recipe=dataclasses.asdict(recipe), **result))
    files.write_atomically(out, lambda f: f.write(text.encode()))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
