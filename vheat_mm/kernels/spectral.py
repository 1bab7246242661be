"""Fast form of :func:`vheat_mm.heat_conduction.heat_conduction`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import onednn
from .positionwise import GROUP_BYTES


def takes_heat_conduction(x: Tensor, decay: Tensor) -> bool:
    if torch.is_grad_enabled() and (x.requires_grad or decay.requires_grad):
        return False
    if not onednn.applies(x):
        return False
    return min(x.shape[1:3]) >= 40 if x.dtype is torch.float32 else x.shape[2] >= 256


def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    from ..heat_conduction import _basis
    b, h, w, c = x.shape
    dw, dh = _basis(w, x), _basis(h, x)
    rows = x.view(b*h, w, c)
    groups = -(-x.numel() * x.element_size() // GROUP_BYTES)
    z = torch.empty(b*h, c, w, dtype=x.dtype)
    for source, target in zip(rows.tensor_split(groups), z.tensor_split(groups)):
        t = source.transpose(1, 2).contiguous()
        target.copy_(onednn.product(t.view(-1, w), dw).view(t.shape))
    z = z.view(b, h, c * w)
    out = torch.empty_like(x)
    groups = -(-groups // b)
    for image, target in zip(z, out):
        m = onednn.product(dh, image.t())
        m.view(h, c, w).mul_(decay.transpose(1, 2))
        m = onednn.product(dh.t().contiguous(), m.t()).view(h, c, w)
        for s, tt in zip(m.tensor_split(groups), target.tensor_split(groups)):
            tt.copy_(onednn.product(s.reshape(-1, w), dw.t()).view(s.shape).transpose(1, 2))
    return out
