"""Which kernels a model runs on an input, and why others declined."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vheat_mm.ops.registry import get_backend, record


@torch.no_grad()
def explain_backends(model: nn.Module, *inputs: Any) -> str:
    """Run a model once in eager mode, and tell what computes each of its modules and ops.

    A module whose submodules kernels stand for runs none of them; one that calls its submodules says why. Below each
    module are its ops, with the backend that computes them, after those that declined and their reasons.

    Args:
        model: Contains a :class:`~vheat_mm.VHeat`, or parts of one; run as it is, in its mode, without gradients.
        inputs: What the model is called with.

    Returns:
        Lines of text; equal ones in a row are given once, with their number.
    """
    names = {id(module): name or 'the model' for name, module in model.named_modules()}
    with record() as notes:
        model(*inputs)
    lines = [f'backend: {get_backend()}']
    for who, what in notes:
        if isinstance(who, nn.Module):
            lines.append(f'{names.get(id(who), "?")} ({type(who).__name__}) {what}')
        else:
            lines.append(f'    {who}: {what}')
    counted: list[tuple[str, int]] = []
    for line in lines:
        if counted and counted[-1][0] == line:
            counted[-1] = (line, counted[-1][1] + 1)
        else:
            counted.append((line, 1))
    return '\n'.join(line if count == 1 else f'{line} ({count} times)' for line, count in counted)
