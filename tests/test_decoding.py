"""Steps of static shapes give what `GPT.hidden` gives; on a CPU without a graph (test_cuda.py has it)."""

import pytest
import torch
from helpers import random_model

from lib.decoding import StaticDecoder, keep_decoders, speed_up


@pytest.mark.parametrize("rows, length", [(1, 1), (3, 7), (2, 15), (2, 16), (1, 40)])
def test_a_static_step_equals_a_growing_one_also_past_the_end_of_the_context(rows, length):
    """16 positions and 40 new tokens: the context is cut and read again four times."""
    model = random_model(block_size=16)
    prompts = torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(0))
    options: dict = dict(max_new_tokens=40, temperature=0.0, stop_token=None)
    plain = list(model.stream_with_logits(prompts, **options))
    model.make_decoder = keep_decoders()
    for _ in range(2):  # the second text is made in the first one's memory
        static = list(model.stream_with_logits(prompts, **options))
        for (token, logits), (same, close) in zip(plain, static):
            assert torch.equal(token, same)
            torch.testing.assert_close(logits, close, rtol=0, atol=1e-4)


def test_one_new_token_needs_no_decoder():
    model, made = random_model(), []
    model.make_decoder = lambda *args: made.append(args)
    model.generate(torch.tensor([[1, 2, 3]]), 1)
    assert not made


def test_what_the_unused_part_of_a_cache_held_does_not_count():
    model = random_model()
    cache = model.new_cache()
    model.hidden(torch.tensor([[1, 2, 3]]), cache)
    for layer in cache:
        assert layer.kv is not None
        layer.kv[..., 3:, :] = torch.nan
    with torch.no_grad():
        x = StaticDecoder(model, cache)(torch.tensor([[4]]), cache)
        whole = model.hidden(torch.tensor([[1, 2, 3, 4]]))[:, -1:]
    torch.testing.assert_close(x, whole, rtol=0, atol=1e-4)


def test_without_a_gpu_it_is_torch_compile(monkeypatch):
    model, compiled = random_model(), []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    speed_up(model)
    assert compiled == [model.hidden] and model.make_decoder is None
