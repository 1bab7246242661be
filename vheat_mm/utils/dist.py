"""Processes of a distributed run, and models inside their wrappers."""

from __future__ import annotations

import os
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn


def any_rank(value: bool) -> bool:
    """Whether ``value`` is true on any rank; every rank must call this."""
    if get_world_size() == 1:
        return value
    flag = torch.tensor(int(value))
    all_reduce(flag, op='max')
    return bool(flag)


def process_rank() -> int:
    """Rank of this process from the launcher's environment variables, 0 without a launcher."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def process_count() -> int:
    """Number of processes from the launcher's environment variables, 1 without a launcher."""
    for name in ('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for distributed training and test-time augmentation."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    return inner
