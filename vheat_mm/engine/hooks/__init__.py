"""Hooks, registered in MMEngine's root ``HOOKS``; ``tools/`` add all but the last to a config.

- :class:`CheckpointCheckHook`: all weights of a checkpoint are loaded, or the run ends.
- :class:`AnnotationCheckHook`: class names and annotations that do not fit the model end the run.
- :class:`AtomicCheckpointHook`: replaces ``CheckpointHook``; files are complete even after a kill.
- :class:`ReproducibleHook`: an interrupted and resumed run equals an uninterrupted one.
- :class:`StopSignalHook`: SIGTERM saves and exits with a status on which a scheduler restarts the job.
- :class:`NonFiniteGuardHook`: steps with a NaN or infinite loss or gradient are skipped.
- :class:`SkipBrokenSamplesHook`: images and annotations that cannot be loaded are skipped and logged.
- :class:`UnusedParametersHook`: outputs that no head reads do not end a distributed training.
- :class:`WritePredictionsHook`: predictions of a test as images and label maps; of ``tools/test.py``.
- :class:`CompileBackboneHook`: ``torch.compile`` for the backbone only; for a config's ``custom_hooks``.
"""

from vheat_mm.engine.hooks.annotation_check_hook import AnnotationCheckHook
from vheat_mm.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from vheat_mm.engine.hooks.checkpoint_check_hook import CheckpointCheckHook
from vheat_mm.engine.hooks.compile_backbone_hook import CompileBackboneHook
from vheat_mm.engine.hooks.non_finite_guard_hook import NonFiniteGuardHook
from vheat_mm.engine.hooks.reproducible_hook import ReproducibleHook
from vheat_mm.engine.hooks.skip_broken_samples_hook import SkipBrokenSamplesHook
from vheat_mm.engine.hooks.stop_signal_hook import StopSignalHook
from vheat_mm.engine.hooks.unused_parameters_hook import UnusedParametersHook
from vheat_mm.engine.hooks.write_predictions_hook import WritePredictionsHook
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
    'UnusedParametersHook',
    'WritePredictionsHook',
]
