"""Cached decay maps: built once per size, and gone as soon as a weight they came from changes."""

import copy
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage

from vheat_mm import VHeat
from vheat_mm.ops.decay_cache import DecayCache


@pytest.fixture
def model(make_vheat) -> VHeat:
    return make_vheat().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def uncached(model: VHeat, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fresh = copy.deepcopy(model)  # a copy has no entries
    with torch.enable_grad():  # and with gradients on nothing is cached
        return tuple(out.detach() for out in fresh(image))


@torch.no_grad()
def test_second_forward_builds_nothing(model, image):
    first = model(image)
    builds = model.decay_cache.builds
    assert builds == 4
    second = model(image)
    assert model.decay_cache.builds == builds
    model(torch.randn(1, 3, 32, 64))  # another size beside it
    model(image)
    assert model.decay_cache.builds == 2 * builds
    for a, b, c in zip(first, second, uncached(model, image), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def optimizer_step(model: VHeat) -> VHeat:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    return model


def load_state_dict(model: VHeat) -> VHeat:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})
    return model


def load_assigned(model: VHeat) -> VHeat:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()}, assign=True)
    return model


def in_place_edit(model: VHeat) -> VHeat:
    for embed in model.freq_embed:
        embed.add_(20.0)
    return model


def to_dtype(model: VHeat) -> VHeat:
    return model.to(torch.float64).to(torch.float32).to(torch.float64)


def ema_swap(model: VHeat) -> VHeat:
    """As MMEngine's EMAHook before validation: through ``.data``, then ``eval()``."""
    average = ExponentialMovingAverage(model)
    for parameter, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        parameter.data.copy_(averaged.data + 0.1)
    return model.eval()


@pytest.mark.parametrize('change', [optimizer_step, load_state_dict, load_assigned, in_place_edit, to_dtype, ema_swap])
@torch.no_grad()
def test_change_of_a_weight_is_seen(model, image, change):
    before = model(image)
    model = change(model)
    image = image.to(model.freq_embed[0].dtype)
    after = model(image)
    for a, b, expected in zip(before, after, uncached(model, image), strict=True):
        torch.testing.assert_close(b, expected)
        assert b.dtype != a.dtype or not torch.allclose(a, b)


def test_another_weight_at_a_freed_address_is_seen():
    """Allocators hand a freed block to the next tensor of its size, which has the same address and version."""
    cache = DecayCache()
    for value in range(10):
        assert through(cache, torch.full((5000,), float(value))) == value + 1
    assert cache.builds == 10


def through(cache: DecayCache, source: torch.Tensor) -> float:
    return cache.get('size', [source], lambda: [source + 1])[0][0].item()


@torch.no_grad()
def test_switching_mode_drops_all(model, image):
    model(image)
    assert len(model.decay_cache) == 4
    model.train()
    assert len(model.decay_cache) == 0
    model(image)
    assert len(model.decay_cache) == 0  # training computes its own


@torch.no_grad()
def test_bounded(model):
    model.decay_cache.max_bytes = 40_000
    for width in range(32, 320, 32):
        model(torch.randn(1, 3, 64, width))
        assert model.decay_cache.nbytes <= 40_000
    assert len(model.decay_cache) > 0


def test_entries_of_inference_mode_serve_autograd(model, image):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        model(image)
    builds = model.decay_cache.builds
    image.requires_grad_()
    sum(out.sum() for out in model(image)).backward()
    assert image.grad.abs().sum() > 0
    assert model.decay_cache.builds == builds


def test_gradients_in_evaluation_mode_reach_the_embeddings(model, image):
    with torch.no_grad():
        model(image)
    model(image)[3].square().sum().backward()
    assert all(embed.grad.abs().sum() > 0 for embed in model.freq_embed)


@torch.no_grad()
def test_copies_start_empty(model, image):
    model(image)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(copied.decay_cache) == 0
        torch.testing.assert_close(copied(image)[3], model(image)[3])
