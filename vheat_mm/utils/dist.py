"""One question to all processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn


def anywhere(here: bool) -> bool:
    """Whether something holds in any process. All of them must call it."""
    if get_world_size() == 1:
        return here
    flag = torch.tensor(int(here))
    all_reduce(flag, op='max')
    return bool(flag)


def process_rank() -> int:
    """Rank of this process as its launcher tells it, 0 without launcher."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def process_count() -> int:
    """Number of processes as the launcher tells it, 1 without launcher."""
    for name in ('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for distribution and test-time augmentation."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    return inner
