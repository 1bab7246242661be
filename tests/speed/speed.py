"""Speed on 2 CPU cores: figures by pytest-benchmark, and the ratios that must hold. Not part of the ordinary tests.

pytest tests/speed/speed.py

Needs a quiet machine with mmdet and pytest-benchmark; about 6 minutes.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools'))
from benchmark_measure import autocast, fitted_exponent, forward, saved_bytes, take_turns, timed, train_step
from benchmark_models import backend_of, build

# (batch, height, width): time over Swin-T at most, by type
FORWARD = {
    (8, 224, 224): dict(fp32=0.75, bf16=0.70),
    (1, 512, 512): dict(fp32=0.80, bf16=0.85),
    (1, 800, 1216): dict(fp32=0.70, bf16=0.75),
}
CASES = [(shape, dtype) for shape, limits in FORWARD.items() for dtype in limits]


@pytest.fixture(scope='module', autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def ready(name, size, train):
    model = build(name, 'tiny', size)
    model.train(train)  # returns None in mmdet's Swin
    return model


def once(step, name, model, image, dtype='fp32'):
    with backend_of(name), autocast('cpu', dtype):
        step(model, image)


@pytest.mark.parametrize('name', ['vheat', 'vheat-reference', 'swin'])
@pytest.mark.parametrize(('shape', 'dtype'), CASES, ids=str)
def test_forward(benchmark, shape, dtype, name):
    benchmark.group = f'forward {shape} {dtype}'
    model, image = ready(name, shape[1:], train=False), torch.randn(shape[0], 3, *shape[1:])
    benchmark.pedantic(once, (forward, name, model, image, dtype), rounds=5, warmup_rounds=2)


@pytest.mark.parametrize('name', ['vheat', 'vheat-reference', 'swin'])
def test_training_step(benchmark, name):
    benchmark.group = 'training step 640x640'
    model, image = ready(name, (640, 640), train=True), torch.randn(1, 3, 640, 640)
    benchmark.pedantic(once, (train_step, name, model, image), rounds=3, warmup_rounds=1)


def ratio_to_swin(step, shape, dtype, train):
    image = torch.randn(shape[0], 3, *shape[1:])
    models = {name: ready(name, shape[1:], train) for name in ('vheat', 'swin')}
    runs = {name: partial(timed, partial(once, step, name, m, image, dtype), 'cpu') for name, m in models.items()}
    results = take_turns(runs, repeats=7, warmup=2)
    return results['vheat'].median / results['swin'].median


@pytest.mark.parametrize(('shape', 'dtype'), CASES, ids=str)
def test_forward_beats_swin(shape, dtype):
    assert ratio_to_swin(forward, shape, dtype, train=False) <= FORWARD[shape][dtype]


def test_training_beats_swin():
    assert ratio_to_swin(train_step, (1, 640, 640), 'fp32', train=True) <= 0.75


def test_training_keeps_less_than_swin():
    image, kept = torch.randn(1, 3, 640, 640), {}
    for name in ('vheat', 'swin'):
        model = ready(name, (640, 640), train=True)
        kept[name] = saved_bytes(model, partial(model, image))
    assert kept['vheat'] <= 0.75 * kept['swin']


def test_cost_grows_almost_like_the_image():
    sides = (224, 320, 448, 640, 896, 1280)
    model = ready('vheat', (512, 512), train=False)
    runs = {
        side: partial(timed, partial(once, forward, 'vheat', model, torch.randn(1, 3, side, side)), 'cpu')
        for side in sides
    }
    results = take_turns(runs, repeats=5, warmup=2)
    assert fitted_exponent([float(s * s) for s in sides], [results[s].median for s in sides]) <= 1.15
