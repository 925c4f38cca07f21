"""Muon takes torch's own steps, in batches of equal shapes."""

import pytest
import torch

from lib.optimizers import Muon, orthogonalize

# Tall, square and wide matrices, and one that is alone with its shape.
SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64), (16, 64), (16, 16), (7, 5), (48, 16)]


def make_matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_muon_equals_torch_s_own():
    ours, theirs = make_matrices(), make_matrices()
    muon = Muon(ours, 0.02, 0.1, torch.bfloat16)
    own = torch.optim.Muon(theirs, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for lr in (0.02, 0.01, 0.03):
        muon.param_groups[0]["lr"] = own.param_groups[0]["lr"] = lr
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        muon.step()
        own.step()
    for mine, other, start in zip(ours, theirs, make_matrices()):
        assert (mine - start).abs().max() > 0.01
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
        buffers = [optimizer.state[p]["momentum_buffer"] for optimizer, p in ((muon, mine), (own, other))]
        torch.testing.assert_close(*buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_muon_s_products_are_float32_unless_the_run_s_are_bfloat16(dtype):
    """bfloat16 takes 60 times as long on a CPU without instructions for it; float16 would overflow."""
    matrix = torch.nn.Parameter(torch.zeros(16, 64))
    matrix.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
    Muon([matrix], 1.0, 0.0, dtype).step()
    exact = orthogonalize(matrix.grad.double()[None])[0]
    torch.testing.assert_close(-matrix.double() / (0.2 * 8), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 32, 8), (3, 8, 32)])
def test_orthogonal_matrices_have_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = torch.linalg.svdvals(orthogonalize(x).float())
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_matrix_of_zeros_stays_zero():
    """So does that of a parameter which got no gradient yet."""
    assert not orthogonalize(torch.zeros(2, 4, 3, dtype=torch.bfloat16)).any()
