"""Optimizer wrappers and their constructors, registered with MMEngine; guards around their steps."""

from vheat_mm.engine.optimizers.cpu_amp import CPUAmpOptimWrapper
from vheat_mm.engine.optimizers.layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['CPUAmpOptimWrapper', 'LayerDecayOptimWrapperConstructor']
