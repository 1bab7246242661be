"""Shared by all tests: golden numbers, small models, quiet logs."""

import os

# Before torch is imported. For small tensors, threads cost more time than they save, on a busy machine ten times more.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope, init_default_scope
from package_env import installed, packages  # noqa: F401

# Fixtures of all tests of tools: trained once a session.
from tool_runs import classifier, data, detector, segmentor  # noqa: F401

from vheat_mm import VHeat

DATA = Path(__file__).parent / 'data'
TINY_WIDTH = dict(embed_dims=4, depths=(1, 1, 2, 1))


@pytest.fixture
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Read a file of tests/data as float64 tensors; see tests/data/README.md for where the numbers come from."""

    def read(name: str) -> dict[str, torch.Tensor]:
        with np.load(DATA / name) as content:
            return {key: torch.from_numpy(content[key].astype(np.float64)) for key in content}

    return read


@pytest.fixture
def make_vheat() -> Callable[..., VHeat]:
    """A VHeat of width 4 for images of 64 pixels; keyword arguments override."""

    def make(post_norm: bool = False, **overrides: object) -> VHeat:
        torch.manual_seed(0)
        arch = dict(TINY_WIDTH, post_norm=post_norm, layer_scale=0.5 if post_norm else None)
        return VHeat(**(dict(arch=arch, img_size=64) | overrides))

    return make


@pytest.fixture
def own_scope():
    """Building registers a global default scope: give each test its own."""
    before = DefaultScope.get_current_instance()
    yield
    if before is not None:
        init_default_scope(before.scope_name)


@pytest.fixture
def one_thread():
    """Small models gain nothing from a second thread, and lose much where other processes use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_stale_logger():
    """MMEngine's loggers keep handlers on closed streams between tests; tools that ran in this process silence all."""
    logging.disable(logging.NOTSET)
    yield
    logging.getLogger('mmengine').handlers.clear()
