"""Hooks of this package, registered in MMEngine's root ``HOOKS``.

``tools/`` use, and any config may name:

- :class:`CheckpointCheckHook`: no weight is ever left out silently.
- :class:`AtomicCheckpointHook`: checkpoints are whole, whatever ends the run; takes ``CheckpointHook``'s place.
- :class:`ReproducibleHook`: an interrupted and resumed run equals the uninterrupted one.
- :class:`StopSignalHook`: SIGTERM saves and ends the run with a status to start it again on.
- :class:`NonFiniteGuardHook`: a loss or gradient that is not finite costs one step, not the run.
- :class:`SkipBrokenSamplesHook`: a bad image or annotation is left out and reported.
- :class:`AnnotationCheckHook`: class names and files that do not fit the model end the run by name.

For a config's ``custom_hooks``:

- :class:`CompileBackboneHook`: ``torch.compile`` for the backbone only.
"""

from .annotation_check import AnnotationCheckHook, AnnotationError
from .atomic_checkpoint import AtomicCheckpointHook
from .broken_samples import SkipBrokenSamplesHook
from .checkpoint_check import CheckpointCheckHook
from .compile_backbone import CompileBackboneHook
from .finite import NonFiniteError, NonFiniteGuardHook
from .reproducible import ReproducibleHook
from .stop_signal import StopRequested, StopSignalHook

__all__ = [
    'AnnotationCheckHook',
    'AnnotationError',
    'AtomicCheckpointHook',
    'CheckpointCheckHook',
    'CompileBackboneHook',
    'NonFiniteError',
    'NonFiniteGuardHook',
    'ReproducibleHook',
    'SkipBrokenSamplesHook',
    'StopRequested',
    'StopSignalHook',
]
