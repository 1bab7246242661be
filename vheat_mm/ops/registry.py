"""Fast forms of the network's steps, and the one place that chooses between them and the reference form.

A step is a function written down as plain mathematics (``vheat_mm/ops/reference.py``, ``vheat_mm/models/vheat.py``) and
decorated with :func:`step`. A fast form is a function of the same name and signature in a module of this package.

The environment variable ``VHEAT_KERNELS``, read at import, says which form runs:

======================  ================================================================================================
``fast`` (default)      fast forms in plain PyTorch where they apply, the reference form elsewhere
``reference``           the reference form everywhere
``triton``              Triton kernels where they apply, ``fast`` elsewhere
======================  ================================================================================================
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

FORMS = ('fast', 'reference', 'triton')
VARIABLE = 'VHEAT_KERNELS'

# form -> step -> module of this package that holds the function of the step's name
_MODULES: dict[str, dict[str, str]] = {
    'fast': dict(
        convolve='eager.convolution',
        embed_patches='eager.convolution',
        fit_freq_embed='eager.resize',
        heat_conduction='eager.spectral',
        heat_norm_gate='eager.spectral',
        decay_map='eager.spectral',
        by_image='eager.positionwise',
        by_position='eager.positionwise',
        linear='eager.positionwise',
        split_linear='eager.positionwise',
        mlp='eager.positionwise',
        norm_gate='eager.positionwise',
    ),
    'compiled': dict.fromkeys(
        ('convolve', 'embed_patches', 'heat_conduction', 'linear', 'split_linear', 'mlp', 'decays_of'), 'compiled'
    ),
    'triton': dict.fromkeys(('heat_conduction', 'heat_norm_gate', 'add_norm', 'norm_add', 'decay_map'), 'triton'),
}

# PyTorch 2.4 and later: what autocast's type is can be asked, and operators can be registered.
_SUPPORTED = hasattr(torch, 'get_autocast_dtype') and hasattr(torch.library, 'custom_op')

_LOADED: dict[str | None, Any] = {}

_Step = TypeVar('_Step', bound=Callable[..., Any])


def check_form(form: str, where: str) -> str:
    """Return ``form`` or raise a ValueError that names ``where`` it came from."""
    if form not in FORMS:
        raise ValueError(f'{where} must be one of {", ".join(FORMS)}, got {form!r}')
    return form


_form = check_form(os.environ.get(VARIABLE) or FORMS[0], f'environment variable {VARIABLE}')


def form() -> str:
    """Form in use: ``'fast'``, ``'reference'`` or ``'triton'``."""
    return _form


@contextmanager
def use(form: str) -> Iterator[None]:
    """Run a block of code with another form than ``VHEAT_KERNELS`` says; for tests and measurements.

    Raises:
        ValueError: Unknown form.
    """
    global _form
    before, _form = _form, check_form(form, 'form')
    try:
        yield
    finally:
        _form = before


def step(reference: _Step) -> _Step:
    """Make a step of its reference form; the decorated function runs the form in use.

    A module of fast forms has, beside each form, ``takes_<step>`` of the same signature, which says whether the form
    applies to these inputs; the reference form runs where it does not.
    """
    name = reference.__name__

    @functools.wraps(reference)
    def dispatched(*args: Any) -> Any:
        for candidate in _candidates():
            module = _load(candidate, name)
            if module is not None and getattr(module, f'takes_{name}')(*args):
                return getattr(module, name)(*args)
        return reference(*args)

    return dispatched  # type: ignore[return-value]


def _candidates() -> tuple[str, ...]:
    if _form == 'reference' or not _SUPPORTED:
        return ()
    if _is_exporting():
        return ()  # an exported graph runs where this package is not installed
    if torch.compiler.is_compiling():
        return ('compiled',)  # the compiler fuses what it sees; fast forms are for what it does worse
    return ('triton', 'fast') if _form == 'triton' else ('fast',)


def _is_exporting() -> bool:
    return hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()


def _load(form: str, name: str) -> Any:
    module = _MODULES[form].get(name)
    if module is not None and module not in _LOADED and not torch.compiler.is_compiling():
        try:
            _LOADED[module] = importlib.import_module(f'vheat_mm.ops.{module}')
        except ModuleNotFoundError as error:
            if error.name != 'triton':
                raise
            raise ModuleNotFoundError(f'{VARIABLE}=triton needs the package triton: pip install triton') from error
    return _LOADED.get(module)


def load_compiled() -> None:
    """Import what compiled graphs use; an import cannot happen while a graph is being traced."""
    for name in _MODULES['compiled'] if _SUPPORTED else ():
        _load('compiled', name)


def forget_prepared(weights: Iterable[Tensor]) -> None:
    """Drop what fast forms keep of these weights."""
    from vheat_mm.ops.eager import onednn

    weights = list(weights)
    onednn.forget(weights)
    if 'compiled' in _LOADED:
        _LOADED['compiled'].forget(weights)
