"""Mixed precision without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """bfloat16 autocast on the CPU, which MMEngine's ``AmpOptimWrapper`` (mmengine <= 0.10.7) refuses.

    bfloat16 has float32's range, so the loss needs no scaling.
    """

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of a forward pass in mixed precision."""
        with super().optim_context(model), autocast(device_type='cpu'):
            yield
