"""A Runner from a config, with this package's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from vheat_mm.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from vheat_mm.engine.runner.distributed import set_up_processes
from vheat_mm.utils.config_place import is_type
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.text import some_of

FAULT_TOLERANCE_HOOKS = (
    'ReproducibleHook',
    'StopSignalHook',
    'NonFiniteGuardHook',
    'SkipBrokenSamplesHook',
    'UnusedParametersHook',
)


def build_runner(cfg: Config, notes: list[str]) -> Runner:
    """Join the other processes, build the runner with the check hooks, and log ``notes``.

    Raises:
        ToolError: See :func:`~vheat_mm.engine.runner.distributed.set_up_processes`; ``FSDPStrategy`` of MMEngine.
    """
    notes = notes + set_up_processes(cfg, cfg.launcher)
    if not is_sharded(cfg):  # sharded weights cannot be compared with a whole checkpoint
        add_hook(cfg, 'CheckpointCheckHook')
    add_hook(cfg, 'AnnotationCheckHook')
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    for note in notes:
        runner.logger.info(note)
    return runner


def begin_run(runner: Runner) -> None:
    """Choose what to resume from before training starts; see :meth:`AtomicCheckpointHook.start`.

    The weights of ``init_cfg`` need not be there for that: ``CheckpointCheckHook`` requires all in the checkpoint.
    """
    hooks = [hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)]
    for hook in hooks[:1]:
        hook.start(runner)
        if runner._resume and isinstance(runner.model, nn.Module):
            skip_pretrained(runner.model)
    if not hooks:
        runner.logger.warning(
            'default_hooks.checkpoint is no AtomicCheckpointHook: MMEngine chooses what to resume from, and restarted '
            'processes begin as the command line says'
        )


def skip_pretrained(model: nn.Module) -> None:
    """Drop ``dict(type='Pretrained', ...)`` from the ``init_cfg`` of all modules, and log it."""
    skipped = []
    for module in model.modules():
        given = getattr(module, 'init_cfg', None)
        entries = [given] if isinstance(given, Mapping) else list(given or [])
        pretrained = [entry for entry in entries if is_type(entry, 'Pretrained') or is_type(entry, 'PretrainedInit')]
        if pretrained:
            kept: Any = [entry for entry in entries if entry not in pretrained]
            module.init_cfg = kept
            skipped += [str(entry.get('checkpoint')) for entry in pretrained]
    if skipped:
        print_log(f'not read, as the resumed checkpoint has all weights: {some_of(skipped)}', 'current')


def add_hook(cfg: Config, name: str) -> None:
    """Append a hook to ``custom_hooks``, unless the config has one of that type."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(is_type(hook, name) for hook in hooks):
        hooks.append(dict(type=name))
    cfg.custom_hooks = hooks


def remove_hook(cfg: Config, name: str) -> None:
    """Remove the hooks of a type from ``custom_hooks``."""
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if not is_type(hook, name)]


def add_fault_tolerance_hooks(cfg: Config) -> None:
    """Add :data:`FAULT_TOLERANCE_HOOKS` and ``AtomicCheckpointHook``; hooks that the config has stay as they are."""
    checkpoint = cfg.setdefault('default_hooks', {}).setdefault('checkpoint', dict(type='CheckpointHook'))
    if isinstance(checkpoint, dict) and is_type(checkpoint, 'CheckpointHook'):
        checkpoint['type'] = 'AtomicCheckpointHook'  # a subclass with the same arguments
    for name in FAULT_TOLERANCE_HOOKS:
        add_hook(cfg, name)


def is_sharded(cfg: Config) -> bool:
    """Whether the config uses FSDP.

    Raises:
        ToolError: With MMEngine's own strategy, which cannot resume.
    """
    strategy = cfg.get('strategy')
    if is_type(strategy, 'FSDPStrategy'):
        raise ToolError(
            "strategy.type='FSDPStrategy' cannot resume (mmengine <= 0.10.7 passes arguments to PyTorch in the wrong "
            "order): set strategy.type='ShardedStrategy' and add 'vheat_mm.fsdp' to custom_imports; see docs/fsdp.md"
        )
    return is_type(strategy, 'ShardedStrategy')


def set_dataloader_defaults(cfg: Config) -> None:
    """Set data-loader options that depend on the task's library, the device, or the number of workers."""
    for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(field)
        if not loader:
            continue
        if cfg.default_scope == 'mmpretrain':  # as mmpretrain's own tools; its models take stacked images
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('persistent_workers', True)
            loader.setdefault('pin_memory', get_device() != 'cpu')
        if not loader.get('num_workers'):
            loader.persistent_workers = False  # PyTorch raises an error without workers
            loader.pop('prefetch_factor', None)
