"""Hooks of this package, registered in MMEngine's root ``HOOKS``; ``tools/`` use all of them.

- :class:`CheckpointCheckHook`: no weight is ever left out silently.
- :class:`ReproducibleHook`: an interrupted and resumed run equals the uninterrupted one.
- :class:`AnnotationCheckHook`: labels and class names that do not fit the model end the run by name.
"""

from .annotation_check import AnnotationCheckHook, AnnotationError
from .checkpoint_check import CheckpointCheckHook
from .reproducible import ReproducibleHook

__all__ = ['AnnotationCheckHook', 'AnnotationError', 'CheckpointCheckHook', 'ReproducibleHook']
