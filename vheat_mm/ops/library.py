"""Custom ops of this package in PyTorch's dispatcher, under ``torch.ops.vheat_mm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vheat_mm.ops.registry import HAS_CUSTOM_OPS


class _Missing:
    """Stands for a custom op in PyTorch before 2.4, where no kernel is ever selected."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def register_autograd(self, *args: Any, **kwargs: Any) -> None:
        pass


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function of tensors the custom op ``vheat_mm::name``; it returns new tensors only."""
    if not HAS_CUSTOM_OPS:
        return _Missing
    return torch.library.custom_op(f'vheat_mm::{name}', mutates_args=())
