"""``torch.compile`` for the backbone of a detector, segmentor or classifier."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from vheat_mm.utils.dist import unwrap


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compile ``model.backbone`` in place when training, validation or testing begins.

    MMEngine's own ``compile=`` compiles a whole ``train_step``, and heads break the graph
    where they turn tensors into Python numbers. A backbone is one graph. State-dict keys do not change.

    Args:
        backend: Of :func:`torch.compile`, as ``mode`` and ``dynamic``.
        mode: Such as ``'max-autotune'``; ``None`` is PyTorch's default.
        dynamic: ``True`` compiles for all image sizes, ``False`` for each size; ``None`` compiles for the first
            size, then for all sizes at the second one.

    Raises:
        TypeError: The model has no backbone.
    """

    def __init__(
        self, backend: str | Callable = 'inductor', mode: str | None = None, dynamic: bool | None = None
    ) -> None:
        self.backend = backend
        self.mode = mode
        self.dynamic = dynamic
        self._compiled: nn.Module | None = None

    def before_train(self, runner: Runner) -> None:
        """Compile, before the first training iteration."""
        self._compile(runner)

    def before_val(self, runner: Runner) -> None:
        """Compile, unless done already."""
        self._compile(runner)

    def before_test(self, runner: Runner) -> None:
        """Compile, unless done already."""
        self._compile(runner)

    def _compile(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        backbone = getattr(model, 'backbone', None)
        if not isinstance(backbone, nn.Module):
            raise TypeError(f'{type(model).__name__} has no backbone to compile: remove CompileBackboneHook')
        if backbone is self._compiled:
            return
        backbone.compile(backend=self.backend, mode=self.mode, dynamic=self.dynamic)
        self._compiled = backbone
        runner.logger.info(f'{type(backbone).__name__} is compiled: the first iterations are slow')
