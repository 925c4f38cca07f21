"""model.py: the network against transformers' GPT-2, its loss, cache, sampling and Hugging Face weights."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import random_model, scripted_model
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import plot
from model import (
    GPT,
    MLP,
    SIZE_NAMES,
    SIZES,
    CausalSelfAttention,
    GPTConfig,
    LinearCrossEntropy,
    config_to_hf,
    sample,
    to_hf,
)

SHAPES = [
    dict(block_size=8, vocab_size=100, n_layer=1, n_head=1, n_embd=8),
    dict(block_size=24, vocab_size=257, n_layer=3, n_head=4, n_embd=32),
    dict(block_size=16, vocab_size=128, n_layer=2, n_head=5, n_embd=40),  # a vocabulary without padding
]


def tokens(model: GPT, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def random_theirs(shape: dict, **options) -> GPT2LMHeadModel:
    """transformers' GPT-2, configured by its own names, with random weights everywhere."""
    shape = {"n_positions" if key == "block_size" else key: value for key, value in shape.items()}
    options |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    config = GPT2Config(**shape, **options)
    theirs = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if ".ln_" in name else 0.0, 0.3, generator=generator)
    return theirs


def as_theirs(model: GPT) -> GPT2LMHeadModel:
    theirs = GPT2LMHeadModel(GPT2Config(**config_to_hf(model.config))).eval()
    missing, unexpected = theirs.load_state_dict(to_hf(model.state_dict(), model.config), strict=False)
    assert missing == ["lm_head.weight"]  # tied to wte
    assert not unexpected
    theirs.tie_weights()
    return theirs


# Shape and size


@pytest.mark.parametrize(
    ("size", "names", "count"),
    [
        ("124M", "gpt2 124m 117M 125M", 124_439_808),
        ("350M", "gpt2-medium GPT2-Medium 345M 355M", 354_823_168),
        ("774M", "gpt2-large 762M", 774_030_080),
        ("1558M", "gpt2-xl 1.5B 1.5b 1542M", 1_557_611_200),
    ],
)
def test_the_published_sizes_have_their_published_parameter_counts(size, names, count):
    config = GPTConfig.named(size)
    assert all(config == GPTConfig.named(name) for name in names.split())
    with torch.device("meta"):
        model = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == count
    assert config.num_params == count
    assert config.padded_vocab_size == 50304


@pytest.mark.parametrize("shape", SHAPES)
def test_num_params_of_any_shape_is_what_the_module_and_transformers_hold(shape):
    config = GPTConfig(**shape)
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert config.num_params == sum(p.numel() for p in GPT(config).parameters()) - padding
    assert config.num_params == sum(p.numel() for p in random_theirs(shape).parameters())


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: GPTConfig(n_embd=100, n_head=12), ["n_embd is 100", "96 or 108"]),
        (lambda: GPTConfig(n_embd=2, n_head=4), ["n_embd is 2", "try 4"]),
        (lambda: GPTConfig(dropout=1.0), ["dropout is 1.0", "[0, 1)"]),
        (lambda: GPTConfig(dropout=-0.1), ["dropout is -0.1"]),
        (lambda: GPTConfig(block_size=0), ["block_size is 0", "at least 1"]),
        (lambda: GPTConfig(n_head=0), ["n_head is 0", "at least 1"]),
        (lambda: GPTConfig(n_layer=-1), ["n_layer is -1", "at least 1"]),
        (lambda: GPTConfig(vocab_size=0), ["vocab_size is 0", "at least 1"]),
        (lambda: GPTConfig(n_layer="2"), ["n_layer is '2'", "whole number"]),  # type: ignore[arg-type]
        (lambda: GPTConfig.named("126M"), ["126M", "124M", "gpt2-xl"]),
    ],
)
@pytest.mark.fault(12)
def test_an_impossible_shape_is_refused_with_its_value_and_the_nearest_that_works(make, parts):
    with pytest.raises(ValueError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


def test_plot_knows_the_same_names_of_sizes():
    assert plot.SIZE_NAMES == SIZE_NAMES and plot.HELLASWAG.keys() == SIZES.keys()


def test_named_sizes_take_overrides():
    config = GPTConfig.named("gpt2", block_size=256, dropout=0.1)
    assert (config.n_layer, config.n_embd, config.block_size, config.dropout) == (12, 768, 256, 0.1)


def test_initial_weights_have_gpt2s_statistics():
    torch.manual_seed(0)
    config = GPTConfig(block_size=512, vocab_size=2000, n_layer=4, n_head=4, n_embd=256)
    model = GPT(config)
    assert not model.wte.weight[config.vocab_size :].any()  # the padding
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            weights = p[: config.vocab_size] if "wte" in name else p
            std = 0.01 if "wpe" in name else 0.02 / 8**0.5 if "c_proj" in name else 0.02
            assert weights.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(weights.mean().item()) < std / 50, name


def test_an_untrained_model_finds_every_token_about_equally_likely():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64))
    idx = tokens(model, 2, 64)
    assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(10.82, abs=0.1)  # ln 50257


# Equality with transformers


def assert_same_function(ours: GPT, theirs: GPT2LMHeadModel):
    """Logits, loss and every gradient, within 1e-4."""
    idx = tokens(ours, 3, ours.config.block_size)
    result = theirs(input_ids=idx, labels=idx)
    torch.testing.assert_close(ours(idx), result.logits, rtol=0, atol=1e-4)
    loss = ours(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss, result.loss, rtol=0, atol=1e-4)
    loss.backward()
    result.loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    converted = to_hf(gradients, ours.config)
    torch.testing.assert_close(converted, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_our_weights_in_transformers_give_equal_logits_loss_and_gradients(shape):
    ours = random_model(**shape)
    assert_same_function(ours, as_theirs(ours))


@pytest.mark.parametrize("shape", SHAPES)
def test_their_weights_in_ours_give_equal_logits_loss_and_gradients(shape, tmp_path):
    theirs = random_theirs(shape)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == GPTConfig(**shape)
    assert_same_function(ours, theirs)


def test_to_hf_and_back_through_a_file_is_bit_for_bit(tmp_path):
    ours = random_model()
    save_file(to_hf(ours.state_dict(), ours.config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(ours.config)), encoding="utf-8")
    again = GPT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    assert all(p.requires_grad for p in again.parameters())


# Causality and the cache


def test_no_gradient_flows_from_a_position_to_later_tokens():
    model = random_model()
    inputs = []
    model.wte.register_forward_hook(lambda module, args, out: inputs.append(out))
    logits = model(tokens(model, 1, 12))
    for t in range(12):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), inputs[0], retain_graph=True)
        assert (gradient[0, : t + 1].abs().sum(dim=-1) > 0).all(), t
        assert not gradient[0, t + 1 :].any(), t


@pytest.mark.parametrize("chunks", [[32], [1] * 32, [5, 1, 3, 7, 16], [1, 31], [31, 1]])
def test_cached_logits_equal_uncached_ones(chunks):
    model = random_model()
    idx = tokens(model, 3, 32)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [1, 9, 32, 45])
def test_cached_generation_equals_uncached_also_past_the_context(temperature, prompt):
    model = random_model()
    idx = tokens(model, 2, prompt)

    def run(use_cache):
        options = dict(temperature=temperature, generator=torch.Generator().manual_seed(3))
        return model.generate(idx, 60, use_cache=use_cache, **options)

    with_cache, without = run(True), run(False)
    assert with_cache.shape == (2, prompt + 60)
    assert torch.equal(with_cache[:, :prompt], idx)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(("block_size", "prompt"), [(8, 3), (8, 8), (8, 20), (1, 1), (1, 4)])
def test_past_the_context_generation_goes_on_from_its_later_half(block_size, prompt):
    model = random_model(block_size=block_size)
    idx = tokens(model, 1, prompt)
    ours, theirs = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
    made = model.generate(idx, 30, generator=ours)[0, prompt:].tolist()
    context = idx[0, -block_size:].tolist()
    for token in made:
        assert token == sample(model(torch.tensor([context]))[:, -1].detach(), generator=theirs).item()
        context.append(token)
        if len(context) > block_size:
            context = context[-max(1, block_size // 2) :]
    assert len(made) == 30


@pytest.mark.fault(12)
def test_a_context_longer_than_the_positions_is_refused_with_both_numbers():
    model = random_model()
    with pytest.raises(ValueError, match=r"33 tokens.*32 positions"):
        model(tokens(model, 1, 33))
    cache = model.new_cache()
    model(tokens(model, 1, 30), cache=cache)
    with pytest.raises(ValueError, match=r"33 tokens.*32 positions"):
        model(tokens(model, 1, 3), cache=cache)


# Generation


def test_generation_stops_at_end_of_text_by_default():
    model = scripted_model([0, 0, 11, 12, 50256, 13, 14])
    made = model.generate(torch.tensor([[1, 2, 3]]), 10, temperature=0.0)
    assert made.tolist() == [[1, 2, 3, 11, 12, 50256]]
    free = model.generate(torch.tensor([[1, 2, 3]]), 5, temperature=0.0, stop_token=None)
    assert free.tolist() == [[1, 2, 3, 11, 12, 50256, 13, 14]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_meets_the_stop_token_repeats_it_and_leaves_the_others_alone(use_cache):
    model = random_model()
    idx = tokens(model, 2, 4)

    def run(stop):
        generator = torch.Generator().manual_seed(5)
        made = model.generate(idx, 20, stop_token=stop, generator=generator, use_cache=use_cache)
        return made[:, 4:].tolist()

    free = run(None)
    stop = next(token for token in free[0][2:6] if token not in free[1])
    end = free[0].index(stop)
    first, second = run(stop)
    assert first == free[0][:end] + [stop] * (20 - end)
    assert second == free[1]
    both = model.generate(idx[:1].repeat(2, 1), 20, temperature=0.0, stop_token=None)[0, 4:].tolist()
    early = model.generate(idx[:1].repeat(2, 1), 20, temperature=0.0, stop_token=both[2])
    assert early.shape[1] == 4 + both.index(both[2]) + 1  # all rows done: nothing more is made


@pytest.mark.parametrize(
    "options", [dict(temperature=0.0), dict(temperature=5.0), dict(top_k=400), dict(top_p=0.99)]
)
def test_padding_ids_are_never_made_even_where_their_rows_are_not_zero(options):
    model = random_model()
    idx = tokens(model, 4, 8)
    targets = idx.roll(-1, 1)
    logits, loss = model(idx), model(idx, targets)
    with torch.no_grad():
        rows = model.wte.weight[model.config.vocab_size :]
        rows.copy_(torch.cat([torch.full_like(rows[::2], 50.0), torch.full_like(rows[1::2], -50.0)]))
    made = model.generate(idx, 40, generator=torch.Generator().manual_seed(0), **options)
    assert made.max().item() < model.config.vocab_size
    assert model(idx).shape == (4, 8, model.config.vocab_size)
    assert torch.equal(model(idx), logits)
    torch.testing.assert_close(model(idx, targets), loss)


def huggingface_probabilities(logits: torch.Tensor, ids: torch.Tensor, **options) -> torch.Tensor:
    """Applies transformers' processors, in the order of its `generate`, and returns probabilities."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    return processors(ids, logits).softmax(dim=-1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "options",
    [
        *(dict(), dict(top_k=20, top_p=0.8, temperature=0.7)),
        *(dict(temperature=temperature) for temperature in (0.5, 3.0)),
        *(dict(top_k=top_k) for top_k in (1, 7, 1000)),
        *(dict(top_p=top_p) for top_p in (0.1, 0.9, 1.0)),
    ],
)
def test_sampling_draws_what_transformers_processors_would(options):
    logits = 2 * torch.randn(1000, 60, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, generator=torch.Generator().manual_seed(1), **options)
    p = huggingface_probabilities(logits, torch.zeros(1000, 1, dtype=torch.long), **options)
    expected = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    assert (p.gather(1, drawn[:, None]) > 0).all()
    assert (drawn == expected).float().mean() > 0.995  # a draw may fall on the border of two tokens


@pytest.mark.parametrize(
    "options",
    [dict(repetition_penalty=1.5), dict(repetition_penalty=0.7, temperature=0.8, top_k=40, top_p=0.9)],
)
def test_every_token_of_a_stream_is_drawn_as_transformers_would(options):
    model = random_model()
    context = tokens(model, 8, 5)
    ours, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    same = 0
    for token, _ in model.stream_with_logits(context.clone(), 20, generator=ours, **options):
        p = huggingface_probabilities(model(context)[:, -1].detach(), context, **options)
        same += (token == torch.multinomial(p, 1, generator=theirs).squeeze(1)).sum().item()
        context = torch.cat([context, token[:, None]], dim=1)
    assert same >= 8 * 20 - 1


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_equals_transformers(penalty):
    model = random_model()
    idx = tokens(model, 1, 6)
    huggingface: Any = as_theirs(model)  # the type of its `generate` fits no model
    options = dict(attention_mask=torch.ones_like(idx), do_sample=False, repetition_penalty=penalty)
    theirs = huggingface.generate(idx, max_new_tokens=20, **options)
    assert torch.equal(model.generate(idx, 20, temperature=0.0, repetition_penalty=penalty), theirs)


def test_temperature_zero_is_greedy_whatever_else_is_asked():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, 0.0, top_k=5, top_p=0.3), logits.argmax(dim=-1))


# The loss


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 5), (3, 7), (4, 32)])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(batch, length):
    model = random_model()
    idx, targets = tokens(model, batch, length), tokens(model, batch, length, seed=2)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    (3 * expected).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss = model(idx, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(idx, targets), loss)


def test_the_loss_under_bfloat16_autocast_is_that_of_cross_entropy_to_its_precision():
    model = random_model(n_embd=64)
    idx, targets = tokens(model, 4, 32), tokens(model, 4, 32, seed=2)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
        with torch.no_grad():
            assert torch.equal(model(idx, targets), loss)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for name, p in model.named_parameters():
        error, size = torch.dist(p.grad, wanted[name]), wanted[name].norm()  # type: ignore[arg-type,union-attr]
        assert p.grad.dtype == torch.float32 and error < 0.05 * size, name  # type: ignore[union-attr]


class LargestFloat32(TorchDispatchMode):
    """Records the largest float32 tensor that is created under it: its elements, and its rows of logits."""

    def __init__(self, columns: set[int]):
        super().__init__()
        self.columns, self.elements, self.rows = columns, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32 and made.dim():
                self.elements = max(self.elements, made.numel())
                if made.size(-1) in self.columns:
                    self.rows = max(self.rows, made.numel() // made.size(-1))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_never_holds_float32_logits_of_the_whole_batch(dtype):
    model = random_model(n_embd=8, vocab_size=600).train()
    idx, targets = tokens(model, 256, 32), tokens(model, 256, 32, seed=2)
    columns = {model.config.vocab_size, model.config.padded_vocab_size}
    with LargestFloat32(columns) as seen:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(idx, targets)
        loss.backward()
    assert 0 < seen.rows <= idx.numel() // 8
    assert seen.elements < idx.numel() * model.config.vocab_size // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_stay_zero_through_adamw_with_weight_decay(dtype):
    model = random_model().train()
    before = model.wte.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(5):
        idx = tokens(model, 4, 16, seed=step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        optimizer.step()
    rows = model.config.vocab_size
    assert model.config.padded_vocab_size > rows
    assert not model.wte.weight[rows:].any()
    assert (model.wte.weight[:rows] != before[:rows]).any(dim=1).all()


# Dropout


def test_dropout_acts_in_training_only():
    plain, model = random_model(), random_model(dropout=0.5)
    idx = tokens(model, 2, 16)
    assert torch.equal(model(idx), plain(idx))
    model.train()
    assert not torch.allclose(model(idx), model(idx))
    assert not torch.allclose(model(idx), plain(idx))


def test_dropout_acts_on_embeddings_attention_weights_and_both_residual_branches():
    config = GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=2, n_embd=64, dropout=0.5)
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mlp, attention = MLP(config), CausalSelfAttention(config)
        full, thin = mlp.eval()(x), mlp.train()(x)
        assert 0.3 < (thin == 0).float().mean() < 0.7
        torch.testing.assert_close(thin[thin != 0], 2 * full[thin != 0])  # the rest is scaled up
        full, thin = attention.eval()(x), attention.train()(x)
        assert 0.3 < (thin == 0).float().mean() < 0.7
        assert not torch.allclose(thin[thin != 0], 2 * full[thin != 0])  # some weights were dropped, too
        model = random_model(dropout=0.5).train()
        for block in model.transformer["h"]:  # type: ignore[union-attr]
            for layer in (block.attn.c_proj, block.mlp.c_proj):  # type: ignore[union-attr]
                layer.weight.zero_()
                layer.bias.zero_()
        idx = tokens(model, 1, 16)
        assert not torch.allclose(model(idx), model(idx))  # only the embeddings' dropout is left


@pytest.mark.parametrize("differentiate", ["create_graph", "hessian", "torch.func"])
def test_second_derivatives_of_the_loss_are_refused(differentiate):
    model = random_model()
    x = tokens(model, 2, 8)
    norm = model.state_dict()["transformer.ln_f.weight"]

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {"transformer.ln_f.weight": weight}, (x, x))

    with pytest.raises(RuntimeError, match=r"no second derivative|setup_context"):
        if differentiate == "create_graph":
            torch.autograd.grad(model(x, x), list(model.parameters()), create_graph=True)
        elif differentiate == "hessian":
            torch.autograd.functional.hvp(loss, norm, norm)
        else:
            torch.func.grad(loss)(norm)


def test_the_gradients_scale_is_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    rows, weight, targets = torch.randn(48, 32), torch.randn(128, 32), torch.randint(100, (48,))
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        x = rows.bfloat16().to(dtype).requires_grad_()
        (LinearCrossEntropy.apply(x, weight.bfloat16().float(), targets, 100, True) / 3).backward()
        assert x.grad is not None
        norms.append(x.grad.float().norm().item())  # 1 / 144 in bfloat16 is 0.2% too large
    assert norms[1] == pytest.approx(norms[0], rel=5e-4)
