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

from vheat_mm.engine.hooks.annotation_check_hook import AnnotationCheckHook
from vheat_mm.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from vheat_mm.engine.hooks.checkpoint_check_hook import CheckpointCheckHook
from vheat_mm.engine.hooks.compile_backbone_hook import CompileBackboneHook
from vheat_mm.engine.hooks.non_finite_guard_hook import NonFiniteGuardHook
from vheat_mm.engine.hooks.reproducible_hook import ReproducibleHook
from vheat_mm.engine.hooks.skip_broken_samples_hook import SkipBrokenSamplesHook
from vheat_mm.engine.hooks.stop_signal_hook import StopSignalHook
from vheat_mm.utils.errors import AnnotationError, NonFiniteError, StopRequested

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
