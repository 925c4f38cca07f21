"""GPT-2 in PyTorch: the network, its loss, its key-value cache, sampling, weights for Hugging Face.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig.named("124M"))         # 124,439,808 parameters, freshly initialised
    model = GPT.from_pretrained("gpt2")          # OpenAI's weights, from the Hub or a local directory
    loss = model(tokens, targets)                # a float32 scalar; 10.9 before training, near 3.1 after
    logits = model(tokens)                       # (B, T, V)

Axes: B batch, T time (tokens), S cached and new tokens together, C channels, V vocabulary, Vp padded
vocabulary, nh heads, hs head size (C = nh * hs).

The architecture follows "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019),
section 2.3, and OpenAI's code (github.com/openai/gpt-2, src/model.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# The four published sizes, by parameter count and by their names on the Hub (paper, table 2).
SIZES = {
    "124M": dict(n_layer=12, n_head=12, n_embd=768),
    "350M": dict(n_layer=24, n_head=16, n_embd=1024),
    "774M": dict(n_layer=36, n_head=20, n_embd=1280),
    "1558M": dict(n_layer=48, n_head=25, n_embd=1600),
}
HUB_NAMES = {"gpt2": "124M", "gpt2-medium": "350M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
# All usual names, in lower case. Papers and programs count the parameters in different ways.
SIZE_NAMES = {size.lower(): size for size in SIZES} | HUB_NAMES | {
    "117m": "124M", "125m": "124M", "345m": "350M", "355m": "350M", "762m": "774M", "1542m": "1558M",
    "1.5b": "1558M",
}  # fmt: skip
END_OF_TEXT = 50256


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2, by default the 124M model's. Raises ValueError for an impossible shape."""

    block_size: int = 1024  # positions, the longest context
    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    gelu: str = "tanh"  # or "none", the exact form, which nanoGPT has (torch's names)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")
        if self.n_embd % self.n_head:
            below = self.n_embd // self.n_head * self.n_head
            near = " or ".join(str(n) for n in (below, below + self.n_head) if n)
            raise ValueError(f"n_embd is {self.n_embd}, which {self.n_head} heads do not divide; try {near}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")

    @classmethod
    def named(cls, size: str, **overrides) -> "GPTConfig":
        """The config of a published size ("124M", "gpt2-xl", "1.5B", ...), with some fields replaced."""
        shape = SIZES.get(SIZE_NAMES.get(size.lower(), ""))
        if shape is None:
            raise ValueError(f"unknown model size {size!r}; choose one of {', '.join([*SIZES, *HUB_NAMES])}")
        return cls(**{**shape, **overrides})

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128, for faster products."""
        return -(-self.vocab_size // 128) * 128

    @property
    def num_params(self) -> int:
        """Trainable parameters, without the padding rows of the embedding."""
        C = self.n_embd
        block = 12 * C * C + (3 + 1 + 4 + 1) * C + 4 * C  # four matrices, their biases, two LayerNorms
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward, per token, in contexts of seq_len tokens.

        6 per parameter in a matrix product, plus 12 * n_layer * C * T for attention, as if it had no causal
        mask: PaLM (Chowdhery et al., 2022), appendix B.
        """
        matmul_params = self.num_params - self.block_size * self.n_embd
        return 6 * matmul_params + 12 * self.n_layer * self.n_embd * seq_len


class KVCache:
    """The keys and values that one attention layer has computed so far, at most `size` tokens. Training does
    not need it."""

    def __init__(self, size: int):
        self.size, self.length = size, 0
        self.kv: torch.Tensor | None = None  # (2, B, nh, size, hs), made by the first append

    def append(self, kv: torch.Tensor) -> torch.Tensor:
        """Adds keys and values (2, B, nh, T, hs). Returns all so far, (2, B, nh, S, hs)."""
        _, B, nh, T, hs = kv.shape
        if self.kv is None:
            self.kv = kv.new_empty(2, B, nh, self.size, hs)
        start, self.length = self.length, self.length + T
        self.kv[..., start : self.length, :] = kv
        return self.kv[..., : self.length, :]

    def mask(self, T: int) -> torch.Tensor | None:
        """Which of S tokens each of T new ones sees, (T, S); None for all, or without earlier ones."""
        S = self.length
        if self.kv is None or not 1 < T < S:
            return None
        return torch.ones(T, S, dtype=torch.bool, device=self.kv.device).tril(S - T)

    def select(self, rows: torch.Tensor, room: int) -> "KVCache":
        """A new cache with a copy of these rows (N,), and room for `room` more tokens."""
        assert self.kv is not None
        selected = KVCache(self.length + room)
        selected.append(self.kv[:, rows, :, : self.length])
        return selected


class CausalSelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, section 3.2); a token sees itself and earlier tokens."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        (q, k, v), mask = qkv, None  # each (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(qkv[1:])  # (B, nh, S, hs)
            mask = cache.mask(T)
        is_causal = False
        if T > 1 and mask is None:  # an if, because T may be symbolic under torch.compile
            is_causal = True
        dropout = self.dropout if self.training else 0.0
        # softmax(q @ k.transpose(-2, -1) / sqrt(hs)) @ v, with the future masked
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two layers, 4 * C wide between them, with GELU, in OpenAI's code its tanh form."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.gelu = config.dropout, config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.gelu)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then the MLP. Each reads a normalised copy of the residual stream x and adds to
    it (pre-LayerNorm: paper, section 2.3)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token and position embeddings, n_layer blocks, a last LayerNorm, logits from the tied wte."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing; see `hidden`
        self.tokenizer_files: dict[str, str] = {}  # of the model it began with; its checkpoints keep them
        self.make_decoder: Callable | None = None  # for faster generation; see lib/decoding.py
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.init_weights()

    @property
    def wte(self) -> nn.Embedding:
        return self.transformer["wte"]  # type: ignore[return-value]

    @property
    def blocks(self) -> Iterable[Block]:
        return self.transformer["h"]  # type: ignore[return-value]

    @torch.no_grad()
    def init_weights(self):
        """Matrices from N(0, 0.02), positions from N(0, 0.01), biases 0, LayerNorm gains 1 (openai/gpt-2,
        src/model.py). The 2 * n_layer projections into the residual stream are scaled by
        1/sqrt(2 * n_layer) (paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith("wpe.weight"):
                nn.init.normal_(p, std=0.01)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        self.wte.weight[self.config.vocab_size :] = 0.0  # padding: it gets no gradient, so it stays zero

    def hidden(self, idx: torch.Tensor, cache: list[KVCache] | None = None) -> torch.Tensor:
        """Token ids (B, T) to the vectors (B, T, C) from which `lm_head` computes the logits.

        With a cache (from `new_cache`), idx continues the tokens in the cache. With `recompute`, training
        stores only each block's input, and the backward pass recomputes the rest with the same dropout
        (Chen et al., 2016, arXiv:1604.06174). Raises ValueError for a context longer than block_size.
        """
        start = cache[0].length if cache else 0  # a tensor in lib/decoding.py
        end = start + idx.size(1)
        if isinstance(end, int) and end > self.config.block_size:
            raise ValueError(f"a context of {end} tokens; this model has {self.config.block_size} positions")
        pos = start + torch.arange(idx.size(1), device=idx.device)
        x = self.wte(idx) + self.transformer["wpe"](pos)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        if self.training and find_product_dtype(x) == torch.bfloat16:
            x = x.bfloat16()  # between the products a GPU waits for memory: this halves the stream's bytes
        for i, block in enumerate(self.blocks):
            if self.recompute and self.training and not cache:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache[i] if cache else None)
        return self.transformer["ln_f"](x)

    def lm_head(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors (..., C) to logits (..., V), by the token embedding's weights. In float32, under autocast
        too: GPT-2's logits lie near -100, where bfloat16 has steps of 0.5."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.wte.weight.float())[..., : self.config.vocab_size]

    def token_losses(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p in nats of each target (N,), given vectors x (N, C): (N,), float64, on the CPU.

        For evaluation. Takes 1,000 rows at a time, whose float32 logits need 200 MB.
        """
        chunks = zip(x.split(1000), targets.split(1000))
        losses = [F.cross_entropy(self.lm_head(x_c), t_c, reduction="none") for x_c, t_c in chunks]
        return torch.cat(losses).cpu().double()

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: list[KVCache] | None = None
    ) -> torch.Tensor:
        """Token ids (B, T) to the logits of each next token, (B, T, V); given targets (B, T), to the mean
        cross-entropy in nats instead."""
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x)
        x = x.to(find_product_dtype(x))  # autocast does not reach into LinearCrossEntropy
        args = (x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size)
        return LinearCrossEntropy.apply(*args, torch.is_grad_enabled())  # type: ignore[return-value]

    def new_cache(self, size: int | None = None) -> list[KVCache]:
        """An empty cache, one KVCache per layer, for `size` tokens (by default block_size)."""
        return [KVCache(size or self.config.block_size) for _ in range(self.config.n_layer)]

    @torch.no_grad()
    def stream_with_logits(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_token: int | None = END_OF_TEXT,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Continues the prompts idx (B, T), T >= 1. Yields the next token of each, (B,), and the logits from
        which it was drawn, (B, V), before penalty and temperature. Ends after max_new_tokens, or when every
        row has reached stop_token; a row that ends earlier repeats it.

        Logits pass, in Hugging Face's order, repetition_penalty (CTRL: Keskar et al., 2019, section 4.1),
        temperature (0 is greedy), top_k, and top_p (nucleus: Holtzman et al., 2019). When the context grows
        past block_size, its later half is kept and read again.
        """
        context, cache = idx[:, -self.config.block_size :], self.new_cache() if use_cache else None
        choices = min(self.config.vocab_size, END_OF_TEXT + 1)  # some published files have padding rows
        seen = torch.zeros(idx.size(0), choices, dtype=torch.bool, device=idx.device)
        seen.scatter_(1, idx, True)
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        unread, read = context, self.hidden
        for _ in range(max_new_tokens):
            if cache and cache[0].length and self.make_decoder and read == self.hidden:
                read = self.make_decoder(self, cache)
            x = read(unread, cache) if cache else self.hidden(context)
            logits = self.lm_head(x[:, -1])[:, :choices]  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the logits are not finite: the weights are damaged, or their sums overflow")
            adjusted = logits
            if repetition_penalty != 1.0:
                penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                adjusted = torch.where(seen, penalised, logits)
            token = sample(adjusted, temperature, top_k, top_p, generator)  # (B,)
            if stop_token is not None:
                token = torch.where(done, stop_token, token)
                done |= token == stop_token
            yield token, logits
            if done.all():
                return
            unread = token[:, None]
            seen.scatter_(1, unread, True)
            context = torch.cat([context, unread], dim=1)
            if context.size(1) > self.config.block_size:
                context = unread = context[:, -max(1, self.config.block_size // 2) :]
                cache, read = self.new_cache() if cache else None, self.hidden

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        """The prompts idx (B, T) and their continuations: (B, T + new). For options see
        `stream_with_logits`."""
        steps = self.stream_with_logits(idx, max_new_tokens, **options)
        return torch.cat([idx, *(token[:, None] for token, _ in steps)], dim=1)

    @classmethod
    def from_pretrained(cls, name: str | Path, dropout: float = 0.0) -> "GPT":
        """A model with somebody's weights: a run, a checkpoint, another Hugging Face directory, a size
        ("gpt2", "124M", ...), a Hub id, or a .pt file of nanoGPT or build-nanogpt. See lib/pretrained.py."""
        from lib.pretrained import locate, read_model

        return read_model(locate(name), dropout)

    def save_pretrained(self, folder: str | Path):
        """Writes a Hugging Face directory, which `from_pretrained` and transformers read."""
        from lib.pretrained import write_model

        write_model(self, Path(folder))


def find_product_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision of matrix products with x: autocast's, or its own."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class LinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(x @ weight.T, targets), the mean, computed for `count_rows` of x at a time.

    A batch's float32 logits would be the largest tensor of all (3.3 GB for B=16, T=1024). Therefore the
    forward pass also computes the gradient: from a chunk's softmax(logits) - onehot(targets) it makes the
    gradients of x and weight, keeps these two, and frees the logits.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size: int, needs_grad: bool):  # pyright: ignore
        """x (N, C), weight (Vp, C), targets (N,) to a float32 scalar. Masks logits from vocab_size on."""
        w = weight.to(x.dtype)
        nll = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dw = [], torch.zeros_like(weight) if needs_grad else None
        rows = LinearCrossEntropy.count_rows(x.size(0))
        for x_c, targets_c in zip(x.split(rows), targets.split(rows)):
            logits = (x_c @ w.t()).float()  # (rows, Vp)
            logits[:, vocab_size:] = -math.inf
            logp = logits.log_softmax(dim=-1)
            del logits  # this is the peak of a step's memory: free each large tensor at once
            # To add a loss term: its sum over the rows to nll, its derivative by the logits to dlogits.
            target_logp = logp.gather(1, targets_c[:, None])  # (rows, 1)
            nll -= target_logp.sum()
            if dw is not None:
                # The backward pass divides by N. Dividing here would underflow in float16.
                # torch.compile turns all of this into one kernel that reads the logits and writes dlogits.
                dlogits = logp.exp_().to(x.dtype)
                dlogits.scatter_(1, targets_c[:, None], (target_logp.exp() - 1).to(x.dtype))
                dx.append(dlogits @ w)
                dw += dlogits.t() @ x_c
                del dlogits
            del logp
        if dw is not None:
            ctx.save_for_backward(torch.cat(dx), dw)
        return nll / targets.numel()

    @staticmethod
    def count_rows(n: int) -> int:
        """An eighth of n, but at least 512: products of fewer rows took a CPU 1.2 times as long."""
        return min(n, max(512, -(-n // 8)))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("this loss has no second derivative; F.cross_entropy of model(tokens) has one")
        dx, dw = ctx.saved_tensors
        scale = grad / dx.size(0)  # float32: rounded to bfloat16, it would shift all gradients alike
        return (dx * scale[None, None]).to(dx.dtype), dw * scale, None, None, None


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws a token id for each row of logits (B, V): (B,). For options see `GPT.stream_with_logits`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        values, order = logits.sort(descending=True)
        p = values.softmax(dim=-1)
        better = p.cumsum(dim=-1) - p  # the sum over all likelier tokens
        logits = logits.scatter(1, order, values.masked_fill(better >= top_p, -math.inf))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


# Hugging Face stores GPT-2's matrices as OpenAI's code did, (in, out). nn.Linear has (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def to_hf(state: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Converts our state dict to that of Hugging Face's GPT2LMHeadModel, without the padding rows."""
    out = {k: v.t().contiguous() if k.endswith(TRANSPOSED) else v for k, v in state.items()}
    out["transformer.wte.weight"] = out["transformer.wte.weight"][: config.vocab_size].contiguous()
    return out


def config_to_hf(config: GPTConfig) -> dict:
    """The config.json from which transformers builds the same network."""
    end_of_text = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "n_positions": config.block_size, "n_ctx": config.block_size,
        "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True,
        "bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": "float32",
    }  # fmt: skip
