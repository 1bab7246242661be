"""Operators, the kernels that can compute them, and the one place that chooses.

An :class:`Op` is a reference function in plain PyTorch (``reference.py``). Backends register kernels of the same
signature with it, explicitly, when they are imported: ``eager/`` for CPUs, ``triton/`` for NVIDIA GPUs. A call takes
the first kernel that supports its inputs, and the reference where none does, so that nothing fails where the reference
runs.

Kernels are ``torch.library`` custom ops, which stand in ``torch.compile`` graphs as they are, or, where gradients need
more than a graph can hold, functions for eager mode (``compiled=False``). A call through this registry and PyTorch's
dispatcher costs 7 us without gradients and 14 us with them, a plain function 1 us and 4 us (AMD EPYC, PyTorch 2.13):
a block makes four to six such calls, under 1 % of the smallest forward pass.

Exported and traced graphs, counters of operations, function transforms and dispatch modes see the reference only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

BACKENDS = ('fast', 'reference', 'triton')

TENSORS = (Tensor, nn.Parameter)

# PyTorch 2.4 and later: the type of autocast can be asked, and custom ops can be registered.
HAS_CUSTOM_OPS = hasattr(torch, 'get_autocast_dtype') and hasattr(torch.library, 'custom_op')

# Kernels of these backends are candidates, in this order.
_ORDER = {'fast': ('fast',), 'reference': (), 'triton': ('triton', 'fast')}

_backend = 'fast'
_record: list[tuple[Any, str]] | None = None


class Kernel(NamedTuple):
    """A way to compute an op.

    Attributes:
        backend: ``'fast'`` or ``'triton'``.
        function: Of the signature of the op.
        supports: Of the same signature; returns ``True``, or the reason why it does not support these inputs.
        compiled: Whether ``torch.compile`` may put it into a graph: ``function`` calls a custom op.
        eager: Whether it runs outside of compiled graphs.
    """

    backend: str
    function: Callable[..., Any]
    supports: Callable[..., bool | str]
    compiled: bool
    eager: bool


class Op:
    """A reference function and the kernels registered for it; call it like the function.

    Args:
        reference: Plain PyTorch; its first argument is a tensor.
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.name = reference.__name__
        self.kernels: list[Kernel] = []

    def register(
        self, backend: str, supports: Callable[..., bool | str], compiled: bool = False, eager: bool = True
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that registers a kernel; see :class:`Kernel`. Earlier ones of a backend go first."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels.append(Kernel(backend, function, supports, compiled, eager))
            return function

        return decorate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = inspect.signature(self.reference).bind(*args, **kwargs).args
        kernel = self.select(*args)
        return self.reference(*args) if kernel is None else kernel.function(*args)

    def select(self, *args: Any) -> Kernel | None:
        """The kernel that a call with these arguments takes; ``None`` for the reference."""
        if not _ORDER[_backend] or not HAS_CUSTOM_OPS or is_traced(args[0]):
            return self._note('reference', None)
        compiling = torch.compiler.is_compiling()
        for backend in _ORDER[_backend]:
            for kernel in self.kernels:
                if kernel.backend != backend:
                    continue
                answer: bool | str = 'it is for compiled graphs'
                if kernel.compiled if compiling else kernel.eager:
                    answer = kernel.supports(*args)
                if answer is True:
                    return self._note(backend, kernel)
                if _record is not None:
                    _record.append((self.name, f'{backend} declined: {answer}'))
        return self._note('reference' if self.kernels else 'reference, there are no kernels', None)

    def _note(self, backend: str, kernel: Kernel | None) -> Kernel | None:
        if _record is not None:
            _record.append((self.name, backend))
        return kernel

    def __repr__(self) -> str:
        return f'Op({self.name}, kernels={[kernel.backend for kernel in self.kernels]})'


def get_backend() -> str:
    """Backend in use: ``'fast'``, ``'reference'`` or ``'triton'``."""
    return _backend


def set_backend(backend: str, where: str = 'backend') -> str:
    """Use ``backend`` from now on; returns the one before.

    Raises:
        ValueError: Unknown backend; the message says ``where`` it came from.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f'{where} must be one of {", ".join(BACKENDS)}, got {backend!r}')
    before, _backend = _backend, backend
    return before


@contextmanager
def record() -> Iterator[list[tuple[Any, str]]]:
    """Note, for a block of eager code, (op or module, what computes it or why a kernel declined), in order."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def note(who: Any, what: str) -> None:
    """Add a line to the running :func:`record`, if there is one."""
    if _record is not None:
        _record.append((who, what))


def is_traced(x: Tensor) -> bool:
    """Whether something beside plain eager mode and ``torch.compile`` runs or watches operations on ``x``.

    Then only the reference may run: its operators are those that tracers, exporters, counters, fake and meta tensors,
    function transforms (``torch.func``), forward-mode AD and dispatch modes know.
    """
    if torch.compiler.is_compiling():
        return hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()
    return (
        type(x) not in TENSORS
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or _has_function_mode()
    )


def _has_function_mode() -> bool:
    """Whether a ``TorchFunctionMode`` is active, other than that of a default device."""
    return any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext
        for i in range(torch._C._len_torch_function_stack())
    )
