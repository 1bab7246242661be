"""``vheat_mm.fsdp``, the name that configs import for :class:`~vheat_mm.engine.strategies.fsdp.ShardedStrategy`."""

from vheat_mm.engine.strategies.fsdp import ShardedStrategy

__all__ = ['ShardedStrategy']
