"""One question to all processes."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce, get_world_size


def anywhere(here: bool) -> bool:
    """Whether something holds in any process. All of them must call it."""
    if get_world_size() == 1:
        return here
    flag = torch.tensor(int(here))
    all_reduce(flag, op='max')
    return bool(flag)
