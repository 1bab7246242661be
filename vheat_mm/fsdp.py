"""``vheat_mm.fsdp``, the public name of :mod:`vheat_mm.engine.strategies.fsdp`, which configs import."""

from vheat_mm.engine.strategies.fsdp import ShardedStrategy

__all__ = ['ShardedStrategy']
