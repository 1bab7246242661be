"""The operator against mathematics and the release's numbers."""

import numpy as np
import pytest
import scipy.fft
import torch

from vheat_mm.models.vheat import HeatConduction2d
from vheat_mm.ops.dct import dct_matrix, squared_frequencies
from vheat_mm.ops.reference import decay_map, heat_conduction

SIZES = [(8, 8), (5, 12), (1, 9), (7, 1), (1, 1)]


@pytest.mark.parametrize('size', SIZES)
def test_transform_is_scipys_dct(size):
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    modes = torch.einsum('nh,bhwc,mw->bnmc', dct_matrix(size[0], x.dtype), x, dct_matrix(size[1], x.dtype))
    expected = scipy.fft.dctn(x.numpy(), axes=(1, 2), norm='ortho')
    np.testing.assert_allclose(modes, expected, atol=1e-12)


@pytest.mark.parametrize('size', SIZES)
def test_damps_each_mode_by_its_factor(size):
    """Against scipy: transform, multiply, transform back; rectangular sizes tell H from W."""
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    decay = torch.rand(*size, 3, dtype=torch.float64)
    modes = scipy.fft.dctn(x.numpy(), axes=(1, 2), norm='ortho') * decay.numpy()
    expected = scipy.fft.idctn(modes, axes=(1, 2), norm='ortho')
    np.testing.assert_allclose(heat_conduction(x, decay), expected, atol=1e-12)


def test_high_modes_of_large_maps_keep_their_digits():
    n = 1280
    exact = scipy.fft.dct(np.eye(n), axis=0, norm='ortho')
    np.testing.assert_allclose(dct_matrix(n, torch.float32), exact, atol=2e-8)


def test_physics():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 14, 4, dtype=torch.float64)
    frequencies = squared_frequencies(9, 14, x.dtype, x.device)[..., None]
    decay = torch.exp(-frequencies * torch.rand(9, 14, 4, dtype=x.dtype))
    out = heat_conduction(x, decay)
    torch.testing.assert_close(out.mean((1, 2)), x.mean((1, 2)))  # insulated borders: heat is conserved
    assert (out.square().sum((1, 2)) < x.square().sum((1, 2))).all()  # and only spreads
    torch.testing.assert_close(heat_conduction(x, torch.ones_like(decay)), x)  # k = 0: nothing moves
    constant = torch.full_like(x, 3.0)
    torch.testing.assert_close(heat_conduction(constant, decay), constant)
    y = torch.randn_like(x)  # self-adjoint
    torch.testing.assert_close((heat_conduction(y, decay) * x).sum(), (y * out).sum())


def test_gradients():
    x = torch.randn(2, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(heat_conduction, (x, decay))


@pytest.mark.parametrize('case', ['', '_rect'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_golden_operator(golden, case, dtype, tolerance):
    numbers = golden('operator.npz')
    op = HeatConduction2d(8).to(dtype)
    op.load_state_dict({key[2:]: value for key, value in numbers.items() if key.startswith('w.')})
    decay = op.decay(numbers[f'freq_embed{case}'].to(dtype))
    out = op(numbers[f'x{case}'].to(dtype).permute(0, 2, 3, 1), decay).permute(0, 3, 1, 2).double()
    expected = numbers[f'y{case}']
    assert (out - expected).norm() / expected.norm() < tolerance


def test_decay_is_float32_in_half_precision():
    """w k reaches hundreds: its exponential is far below what float16 and bfloat16 can tell from 0 or 1."""
    embed, weight, bias = torch.randn(6, 7, 4), torch.randn(4, 4), torch.randn(4)
    exact = decay_map(embed.double(), weight.double(), bias.double())
    with torch.autocast('cpu', torch.bfloat16):
        mixed = decay_map(embed, weight, bias)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-4, atol=1e-7)
    assert decay_map(embed.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_range(dtype, tolerance):
    """The DC coefficient of a constant 320 x 320 map of 300 is 96000; float16 ends at 65504."""
    x = torch.full((1, 320, 320, 2), 300.0)
    out = heat_conduction(x.to(dtype), torch.ones(320, 320, 2))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), x, rtol=10 * tolerance, atol=0)
    x = torch.randn(1, 20, 33, 4)
    decay = torch.rand(20, 33, 4)
    half, exact = heat_conduction(x.to(dtype), decay).float(), heat_conduction(x, decay)
    assert (half - exact).norm() / exact.norm() < tolerance
