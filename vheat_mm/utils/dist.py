"""Processes of a distributed run, and models inside their wrappers."""

from __future__ import annotations

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


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for distributed training and test-time augmentation."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    return inner
