"""Kept decay maps: built once per size, and never older than the weights they came from."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


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
    """As MMEngine's EMAHook before validation, without ``eval()`` afterwards."""
    average = ExponentialMovingAverage(model)
    for parameter, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        parameter.data.copy_(averaged.data + 0.1)
    return model


def teacher_update(model: VHeat) -> VHeat:
    """As mmdet's MeanTeacherHook (SoftTeacher) and DINO: in place through ``.data``."""
    for parameter in model.parameters():
        parameter.data.mul_(0.9).add_(0.1)
    return model


def fused_step(model: VHeat) -> VHeat:
    """Fused optimizers raise no version counter."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    return model


def new_memory(model: VHeat) -> VHeat:
    vector_to_parameters(parameters_to_vector(model.parameters()) + 0.1, model.parameters())
    return model


def numpy_view(model: VHeat) -> VHeat:
    for parameter in model.parameters():
        parameter.detach().numpy()[:] += 0.1
    return model


def shared_memory(model: VHeat) -> VHeat:
    """As another process writes: through a second tensor on the same memory."""
    model.share_memory()
    model.decay_cache.clear()
    model(torch.randn(1, 3, 64, 96))
    for parameter in model.parameters():
        torch.frombuffer(memoryview(parameter.detach().numpy()).cast('B'), dtype=torch.float32).add_(0.1)
    return model


def swapped(model: VHeat) -> VHeat:
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter + 0.1))
    return model


@pytest.mark.parametrize(
    'change',
    [
        *(optimizer_step, load_state_dict, load_assigned, in_place_edit, to_dtype, ema_swap, teacher_update),
        *(fused_step, new_memory, numpy_view, shared_memory, swapped),
    ],
)
@torch.no_grad()
def test_change_of_a_weight_is_seen(model, image, change):
    before = model(image)
    model = change(model)
    image = image.to(model.freq_embed[0].dtype)
    after = model(image)
    for a, b, expected in zip(before, after, uncached(model, image), strict=True):
        torch.testing.assert_close(b, expected, rtol=1e-3, atol=1e-4)
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
def test_bounded(model):
    model.decay_cache.max_bytes = 80_000
    for width in range(32, 320, 32):
        model(torch.randn(1, 3, 64, width))
        assert model.decay_cache.nbytes <= 80_000
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


@torch.no_grad()
def test_two_threads_share_a_model(model):
    images = [torch.randn(1, 3, 64, width) for width in (64, 96)]
    expected = [copy.deepcopy(model)(image)[3] for image in images]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: torch.no_grad()(model)(images[i % 2])[3], range(16)))
    for i, out in enumerate(found):
        torch.testing.assert_close(out, expected[i % 2])


def test_functional_call_takes_the_weights_given(model, image):
    other = {key: value + 0.1 for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(image)[3].clone()
        found = torch.func.functional_call(model, other, (image,))[3]
        assert torch.equal(model(image)[3], before)
    model.load_state_dict(other)
    torch.testing.assert_close(found, uncached(model, image)[3], rtol=1e-3, atol=1e-4)
