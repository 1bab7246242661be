"""Command line and config, shared by training and testing."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import init_default_scope

from vheat_mm.checkpoint.resume import find_newest, peek
from vheat_mm.utils.errors import ToolError, describe
from vheat_mm.utils.torchvision import ensure_torchvision

RUN_STARTED = 'VHEAT_RUN_STARTED'  # seconds since the epoch, set by tools/dist_run.py
SCOPES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}  # and pip's name for it


class CheckedDictAction(DictAction):
    """MMEngine's ``KEY=VALUE`` options; a part without ``=`` is a usage error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence | None,
        option_string: str | None = None,
    ) -> None:
        for value in values or ():
            if '=' not in value:
                parser.error(f'{option_string}: expected KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what both tools take; ``config`` is the first positional argument."""
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    parser.add_argument('--work-dir', help='folder for logs and results (default: work_dirs/<name of the config>)')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='who starts the processes'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch')
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``config``, the first positional argument, and ``--cfg-options``."""
    parser.add_argument('config', help='config file; its default_scope (mmdet, mmseg, mmpretrain) decides the task')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CheckedDictAction,
        metavar='KEY=VALUE',
        help='override entries of the config: model.backbone.drop_path_rate=0.2; lists as key="[a,b]" or key=a,b, '
        'nested ones as key="[(a,b),(c,d)]", quoted and without blanks',
    )


def read_config(args: argparse.Namespace) -> Config:
    """Read the config, apply ``--cfg-options`` and ``--work-dir``, and make the task's library importable.

    Raises:
        ToolError: No such file, errors in it or its bases, unknown task, library not installed.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = Path(args.config)
    if not path.is_file():
        raise ToolError(f'there is no config {args.config!r} (working directory {Path.cwd()})')
    ensure_torchvision()  # mmdet and mmpretrain import it, which custom_imports of a config may do
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise ToolError(f'cannot read the config {args.config!r}: {describe(error)}') from error
    if args.cfg_options:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except Exception as error:
            raise ToolError(f'--cfg-options do not fit {args.config!r}: {describe(error)}') from error
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / path.stem)

    scope = cfg.get('default_scope')
    if scope not in SCOPES:
        raise ToolError(
            f'{args.config!r} has default_scope={scope!r}, expected one of {sorted(SCOPES)}; inherit a base config of '
            "the task, such as mmdet::_base_/default_runtime.py, or set default_scope='mmdet'"
        )
    if 'model' not in cfg:
        raise ToolError(f'{args.config!r} defines no model')
    if importlib.util.find_spec(scope) is None:
        raise ToolError(f'{args.config!r} needs {scope}, which is not installed: pip install {SCOPES[scope]}')
    init_default_scope(scope)
    return cfg


def add_hook(cfg: Config, name: str) -> None:
    """Append a hook of ours, unless the config configures it itself."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(is_type(hook, name) for hook in hooks):
        hooks.append(dict(type=name))
    cfg.custom_hooks = hooks


def is_type(part: Any, name: str) -> bool:
    """Whether a part of a config is of that type: written as a name, with or without scope or module, or a class."""
    kind = part.get('type') if isinstance(part, dict) else type(part)
    return (kind if isinstance(kind, str) else getattr(kind, '__name__', '')).split('.')[-1] == name


def drop_hook(cfg: Config, name: str) -> None:
    """Remove a hook from the config, in place."""
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if not is_type(hook, name)]


def add_robust_hooks(cfg: Config) -> None:
    """Put the hooks that a long training lives on into a config, in place; those it configures itself stay."""
    checkpoint = cfg.setdefault('default_hooks', {}).setdefault('checkpoint', dict(type='CheckpointHook'))
    if isinstance(checkpoint, dict) and is_type(checkpoint, 'CheckpointHook'):
        checkpoint['type'] = 'AtomicCheckpointHook'  # a subclass, with the same arguments
    for name in ('ReproducibleHook', 'StopSignalHook', 'NonFiniteGuardHook', 'SkipBrokenSamplesHook'):
        add_hook(cfg, name)


def shards(cfg: Config) -> bool:
    """Whether FSDP cuts the model in parts.

    Raises:
        ToolError: By MMEngine's own strategy, which cannot resume.
    """
    strategy = cfg.get('strategy')
    if is_type(strategy, 'FSDPStrategy'):
        raise ToolError(
            "strategy.type='FSDPStrategy' cannot resume (mmengine <= 0.10.7 hands PyTorch its arguments in the wrong "
            "order): set strategy.type='ShardedStrategy' and add 'vheat_mm.fsdp' to custom_imports; see docs/fsdp.md"
        )
    return is_type(strategy, 'ShardedStrategy')


def apply_randomness(cfg: Config, seed: int | None, deterministic: bool) -> None:
    """``--seed`` and ``--deterministic``, in place."""
    randomness = {'seed': None, **(cfg.get('randomness') or {})}
    if seed is not None:
        randomness['seed'] = seed
    if deterministic:
        randomness['deterministic'] = True
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # what PyTorch asks for on GPUs
    cfg.randomness = randomness


def fit_dataloaders(cfg: Config) -> None:
    """Settle what depends on the machine, in place."""
    for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(field)
        if not loader:
            continue
        if cfg.default_scope == 'mmpretrain':  # mmpretrain's models take stacked images; its tools set this, too
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('persistent_workers', True)
            loader.setdefault('pin_memory', get_device() != 'cpu')
        if not loader.get('num_workers'):
            loader.persistent_workers = False  # PyTorch refuses it without workers
            loader.pop('prefetch_factor', None)


def apply_resume(cfg: Config, resume: str | None) -> list[str]:
    """``--resume [PATH]``, in place; also restores the seed before samplers are built. Returns lines for the log.

    Processes that torchrun has started again resume by themselves, from what their run has saved so far.

    Raises:
        ToolError: The checkpoint cannot be resumed from.
        CheckpointError: It cannot be read.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    path, notes = _saved_by_this_run(cfg)
    if path is None and resume == 'auto':
        path, notes = find_newest(cfg.work_dir)
        if path is None:  # the first start of a job that is always started with --resume
            notes.append(f'nothing to resume from in {cfg.work_dir}: training starts from the beginning')
    path = path or (resume if resume != 'auto' else None)
    if path is None:
        cfg.resume = False
        return notes
    cfg.load_from, cfg.resume = path, True
    meta = peek(path).get('meta', {})
    if 'iter' not in meta:
        raise ToolError(
            f'cannot resume from {path!r}: it holds weights but no training state; to start a new training from '
            'these weights, drop --resume and pass --cfg-options load_from=PATH'
        )
    notes += [f'resuming from {path}, epoch {meta.get("epoch")}, iteration {meta["iter"]}']
    randomness = dict(cfg.get('randomness') or {})
    if meta.get('seed') is not None and meta['seed'] != randomness.get('seed'):
        cfg.randomness = {**randomness, 'seed': meta['seed']}
        notes.append(f'the seed of the interrupted run is used: {meta["seed"]}')
    return notes


def _saved_by_this_run(cfg: Config) -> tuple[str | None, list[str]]:
    """The newest checkpoint that earlier processes of this start of dist_run.py or torchrun have left, if any."""
    if RUN_STARTED in os.environ:
        return find_newest(cfg.work_dir, since=float(os.environ[RUN_STARTED]))
    if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0':
        return find_newest(cfg.work_dir)
    return None, []


def apply_amp(cfg: Config) -> None:
    """``--amp``, in place.

    Raises:
        ToolError: The optimizer wrapper is another one already; no such kernels on this device.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind == 'AmpOptimWrapper':
        pass
    elif kind != 'OptimWrapper':
        raise ToolError(f'--amp replaces OptimWrapper only, and optim_wrapper.type is {kind!r}: drop --amp')
    if get_device() == 'cpu':
        if cfg.default_scope == 'mmdet':
            raise ToolError("--amp on the CPU: mmcv's operators of detection have no bfloat16 there; drop --amp")
        wrapper.type = 'CPUAmpOptimWrapper'
        wrapper.pop('loss_scale', None)
        return
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def apply_auto_scale_lr(cfg: Config, path: str) -> None:
    """``--auto-scale-lr``, in place.

    Raises:
        ToolError: The config does not say for which batch size its learning rate was chosen.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise ToolError(
            f'--auto-scale-lr: {path!r} does not say for which batch size its learning rate is: '
            'add auto_scale_lr=dict(base_batch_size=16), all GPUs together, or drop the flag'
        )
    cfg.auto_scale_lr.enable = True
