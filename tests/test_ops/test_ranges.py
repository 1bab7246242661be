"""Extreme maps and diffusivities in every type: finite, and as exact as the type, wherever float64's result fits.

Triton's kernels get a process of their own, in which the interpreter runs this file's operator tests on smaller maps.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vheat_mm.models.vheat import Block, HeatConduction2d
from vheat_mm.ops.backends import use_backend
from vheat_mm.ops.reference import decay_map, heat_conduction

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
OWN_PROCESS = pytest.mark.skipif(INTERPRETED, reason='the interpreter takes seconds for each map')
BACKENDS = ('triton',) if INTERPRETED else ('reference', 'fast')
SIDE = 16 if INTERPRETED else 320
# Against the largest element. A single pixel's modes, over 1024, are subnormal in float16: 0.4 % of error.
ERRORS = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 3e-2}
LARGEST = {torch.float32: 1e30, torch.float16: 6e4, torch.bfloat16: 1e30}


def make_map(kind, value, side=SIDE):
    """(1, side, side, 2) in float64, nowhere larger than ``value``."""
    n = torch.arange(side)
    x = torch.zeros(1, side, side, 2, dtype=torch.float64)
    if kind == 'constant':
        x += 1
    elif kind == 'pixel':
        x[:, 3, side // 2] = 1
    elif kind == 'alternating':
        x += (1 - 2 * ((n[:, None] + n) % 2)).double()[:, :, None]
    else:
        x += (n / (side - 1) * 2 - 1)[:, None, None]
    x[..., 1] *= -0.5
    return x * value


def diffused(side, k):
    """Decay (side, side, 2) of diffusivity k."""
    embed = torch.zeros(side, side, 2)
    return decay_map(embed, torch.zeros(2, 2), torch.full((2,), float(k)))


def distance(found, exact):
    """Largest error against the largest element; infinite where an element is not finite."""
    error = (found.double() - exact).abs().max() / exact.abs().max()
    return error.item() if found.isfinite().all() else float('inf')


def in_backend(backend, x, decay, cotangent=None):
    """Heat conduction, with a cotangent its gradients too."""
    gradients = cotangent is not None
    x, decay = x.detach().clone().requires_grad_(gradients), decay.detach().clone().requires_grad_(gradients)
    with use_backend(backend):
        out = heat_conduction(x, decay)
    if not gradients:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, [x, decay], cotangent.to(out.dtype))]


@pytest.mark.parametrize('kind', ['constant', 'pixel', 'alternating', 'ramp'])
@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_large_maps_of_large_values(backend, dtype, kind):
    decay = diffused(SIDE, 0.5)
    for value in (1.0, LARGEST[dtype]):
        x = make_map(kind, value).to(dtype)
        exact = in_backend('reference', x.double(), decay.double())
        for found, wanted in zip(in_backend(backend, x, decay), exact, strict=True):
            assert found.dtype is dtype
            assert distance(found, wanted) < ERRORS[dtype]


@pytest.mark.parametrize('kind', ['constant', 'pixel', 'alternating', 'ramp'])
@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_gradients_of_large_maps(backend, dtype, kind):
    """A loss scale makes gradients large: of 60 everywhere, the DC coefficient's is 19200, the decay's 10^8."""
    x, cotangent, decay = (*(make_map(kind, value).to(dtype) for value in (100.0, 60.0)), diffused(SIDE, 0.5))
    exact = in_backend('reference', x.double(), decay.double(), cotangent.double())
    for found, wanted in zip(in_backend(backend, x, decay, cotangent), exact, strict=True):
        assert distance(found, wanted) < ERRORS[dtype]


@OWN_PROCESS
@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_small_gradients_keep_their_digits(backend, dtype):
    """Of a large map, in float16 divided by 1024 they would be subnormal."""
    torch.manual_seed(0)
    side = 160
    x, decay = torch.randn(1, side, side, 2).to(dtype), diffused(side, 0.5)
    cotangent = (torch.randn(1, side, side, 2) * 1e-3).to(dtype)
    exact = in_backend('reference', x.double(), decay.double(), cotangent.double())
    for found, wanted in zip(in_backend(backend, x, decay, cotangent), exact, strict=True):
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < ERRORS[dtype]


@OWN_PROCESS
@pytest.mark.parametrize('k', [0, 1e-30, 1e-3, 1, 1e4, 1e30])
@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_constants_stay_constant(backend, dtype, k):
    side = 50
    x = make_map('constant', 3e3, side).to(dtype)
    (found,) = in_backend(backend, x, diffused(side, k))
    assert distance(found, x.double()) < ERRORS[dtype]


@OWN_PROCESS
@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_no_diffusivity_lets_heat_grow(backend, dtype):
    """ReLU keeps k from being negative: every factor lies in [0, 1], whatever the FVEs, and gradients are finite."""
    torch.manual_seed(0)
    for size in (1e-20, 1.0, 1e15):
        embed, weight, bias = (torch.randn(s) * size for s in ((9, 7, 4), (4, 4), (4,)))
        with use_backend(backend):
            inputs = [t.to(dtype).requires_grad_() for t in (embed, weight.clamp(-1e4, 1e4), bias.clamp(-1e4, 1e4))]
            if dtype is torch.float16:
                inputs = [t.detach().clamp(-6e4, 6e4).requires_grad_() for t in inputs]
            decay = decay_map(*inputs)
            gradients = torch.autograd.grad(decay.sum(), inputs)
        assert decay.dtype is torch.float32
        assert ((decay >= 0) & (decay <= 1)).all()
        assert (decay[0, 0] == 1).all()  # no factor damps the mean
        assert all(g.isfinite().all() for g in gradients)


@OWN_PROCESS
def test_second_derivative_of_float16_is_refused():
    x = torch.randn(1, 4, 4, 2).half().requires_grad_()
    with pytest.raises(RuntimeError, match='no second derivative in float16: use float32 or bfloat16'):
        torch.autograd.grad(heat_conduction(x, diffused(4, 1)).sum(), x, create_graph=True)


MODES = [
    pytest.param(torch.float16, False, id='float16'),
    pytest.param(torch.bfloat16, False, id='bfloat16'),
    pytest.param(torch.float16, True, id='autocast float16'),
    pytest.param(torch.bfloat16, True, id='autocast bfloat16'),
]


@OWN_PROCESS
@pytest.mark.parametrize('kind', ['constant', 'pixel', 'alternating', 'ramp'])
@pytest.mark.parametrize(('dtype', 'autocast'), MODES)
@pytest.mark.parametrize('backend', ['reference', 'fast'])
def test_operator_and_block(backend, dtype, autocast, kind):
    """The parts around the spectral op too: conv, linear maps, norms, gate, MLP; outputs and all gradients."""
    torch.manual_seed(0)
    side = 64
    x = (make_map(kind, 300.0, side)[..., :1] * torch.randn(8) + 0.1 * torch.randn(1, side, side, 8)).float()
    decay = diffused(side, 0.5)[..., :1].expand(-1, -1, 8)
    for module in (HeatConduction2d(8), Block(8, 32, 0.0, False, None)):
        exact = whole('reference', copy.deepcopy(module).double(), x.double(), decay.double())
        if autocast:
            with torch.autocast('cpu', dtype):
                found = whole(backend, module, x, decay)
        else:
            found = whole(backend, module.to(dtype), x.to(dtype), decay)
        assert len(found) == len(exact)
        assert all(part.isfinite().all() for part in found)
        if kind == 'alternating':
            continue  # diffused away to the rounding of what it was, which the norm then amplifies
        assert ((found[0].double() - exact[0]).norm() / exact[0].norm()).item() < 2 * ERRORS[dtype]


def whole(backend, module, x, decay):
    """Output and gradients of all parameters that get one."""
    x = x.detach().clone().requires_grad_()
    with use_backend(backend):
        out = module(x, decay)
        out.float().square().mean().backward() if out.dtype is not torch.float64 else out.square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@OWN_PROCESS
def test_triton_kernels(tmp_path):
    if importlib.util.find_spec('triton') is None:
        pytest.skip('triton is not installed')
    environment = os.environ | dict(TRITON_INTERPRET='1', TRITON_CACHE_DIR=str(tmp_path))
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        '-k',
        'not float32 and not ramp',
        __file__,
    ]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
