"""What the fast forms' own gradients share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse gradients of gradients, which the fast forms do not know.

    Raises:
        RuntimeError: ``create_graph=True``.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # so PyTorch runs backward under create_graph=True, and only then
            raise RuntimeError(
                'the fast forms of vheat_mm have no second derivative (create_graph=True): '
                'set the environment variable VHEAT_KERNELS=reference'
            )
        return backward(ctx, *grads)

    return checked
