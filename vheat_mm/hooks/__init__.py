"""Hooks of this package, registered in MMEngine's root ``HOOKS``.

``tools/`` use:

- :class:`CheckpointCheckHook`: no weight is ever left out silently.
- :class:`ReproducibleHook`: an interrupted and resumed run equals the uninterrupted one.
- :class:`AnnotationCheckHook`: labels and class names that do not fit the model end the run by name.

For a config's ``custom_hooks``:

- :class:`CompileBackboneHook`: ``torch.compile`` for the backbone only.
"""

from .annotation_check import AnnotationCheckHook, AnnotationError
from .checkpoint_check import CheckpointCheckHook
from .compile_backbone import CompileBackboneHook
from .reproducible import ReproducibleHook

__all__ = [
    'AnnotationCheckHook',
    'AnnotationError',
    'CheckpointCheckHook',
    'CompileBackboneHook',
    'ReproducibleHook',
]
