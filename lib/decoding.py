"""Faster generation for long texts: on CUDA a new token's step is one graph, elsewhere torch.compile.

    speed_up(model)                          # then model.generate(...) as before

A step of one token launches some two hundred kernels, each shorter than its launch. A CUDA graph is one
launch. It needs shapes that stay the same, so its key-value cache has its full size from the beginning.
"""

from collections.abc import Callable

import torch

from model import GPT, KVCache


class StaticKVCache(KVCache):
    """A cache of full size that takes one token at a time. Its length is a tensor (1,), on the device."""

    def __init__(self, cache: KVCache, length: torch.Tensor):
        assert cache.kv is not None
        self.size, self.length, self.kv = cache.size, length, cache.kv  # type: ignore[assignment]
        self.kv[..., cache.length :, :] = 0.0  # attention multiplies it by zero, which nan would survive

    def append(self, kv: torch.Tensor) -> torch.Tensor:
        """Adds keys and values (2, B, nh, 1, hs). Returns all places, (2, B, nh, size, hs)."""
        assert self.kv is not None
        return self.kv.index_copy_(3, self.length, kv)  # type: ignore[arg-type]

    def mask(self, T: int) -> torch.Tensor:
        return torch.arange(self.size, device=self.kv.device) <= self.length[:, None]  # type: ignore


class StaticDecoder:
    """`GPT.hidden` for one new token in each row, after a context that is in the cache."""

    def __init__(self, model: GPT, cache: list[KVCache]):
        assert cache[0].kv is not None
        device, rows = cache[0].kv.device, cache[0].kv.size(1)
        self.model, self.length = model, torch.tensor([cache[0].length], device=device)
        self.cache: list[KVCache] = [StaticKVCache(layer, self.length) for layer in cache]
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # libraries take their memory now: a graph must not do so
                self.model.hidden(self.token, self.cache)
            torch.cuda.current_stream(device).wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.x = self.model.hidden(self.token, self.cache)

    def begin(self, cache: list[KVCache]) -> "StaticDecoder":
        """Continues another context, with as many rows."""
        for mine, layer in zip(self.cache, cache):
            if mine.kv is not layer.kv:
                assert mine.kv is not None and layer.kv is not None
                mine.kv[..., : layer.length, :] = layer.kv[..., : layer.length, :]
        self.length.fill_(cache[0].length)
        return self

    def __call__(self, token: torch.Tensor, cache: list[KVCache]) -> torch.Tensor:
        """Token ids (B, 1) to vectors (B, 1, C), which the next call overwrites."""
        self.token.copy_(token)
        if self.graph:
            self.graph.replay()
        else:
            self.x = self.model.hidden(self.token, self.cache)
        self.length += 1
        return self.x


def keep_decoders() -> Callable[[GPT, list[KVCache]], StaticDecoder]:
    """A function that makes a decoder once for each number of rows, and then uses it again."""
    decoders: dict[int, StaticDecoder] = {}

    def make_decoder(model: GPT, cache: list[KVCache]) -> StaticDecoder:
        assert cache[0].kv is not None
        rows = cache[0].kv.size(1)
        if rows not in decoders:
            decoders[rows] = StaticDecoder(model, cache)
        return decoders[rows].begin(cache)

    return make_decoder


def speed_up(model: GPT):
    """Makes generation faster, after some seconds at its beginning. Cast the linear layers before
    (cast_linears): a graph cannot use weights that autocast casts and frees."""
    if model.wte.weight.device.type == "cuda":
        model.make_decoder = keep_decoders()
    else:
        model.hidden = torch.compile(model.hidden)
