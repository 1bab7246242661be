"""Arguments of the command-line tools, and their effects on a config."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope

from vheat_mm.apis.cfg_options import CfgOptionsAction, check_keys
from vheat_mm.checkpoint.released import RELEASES, find_released, locate
from vheat_mm.engine.by_name import PREFIX, config_path, find_config
from vheat_mm.utils.config_place import type_name
from vheat_mm.utils.errors import ToolError, describe
from vheat_mm.utils.torchvision import ensure_torchvision

SCOPES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}  # default_scope -> name on PyPI


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of both tools; ``config`` is the first positional one."""
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
        action=CfgOptionsAction,
        metavar='KEY=VALUE',
        help='override entries of the config: model.backbone.drop_path_rate=0.2; lists as key="[a,b]" or key=a,b, '
        'nested ones as key="[(a,b),(c,d)]", quoted and without blanks; dicts as key="dict(lr=1,x=2)"',
    )


def read_config(args: argparse.Namespace) -> Config:
    """Read the config, apply ``--cfg-options`` and ``--work-dir``, and set the default scope.

    Raises:
        ToolError: See :func:`open_config`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = open_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def open_config(config: str | os.PathLike | Config, options: dict[str, Any] | None = None) -> Config:
    """A config with ``options`` applied (those of ``--cfg-options``); sets its default scope in this process.

    Args:
        config: Path, name such as ``'vheat_mm::detection/mask-rcnn_vheat-t_fpn_1x_coco.py'``, or a config, which is
            copied.
        options: Values by their places, such as ``{'model.backbone.drop_path_rate': 0.2}``.

    Raises:
        ToolError: The file does not exist, it or a base file has errors, unknown task, library not installed.
    """
    ensure_torchvision()  # mmdet and mmpretrain import it; custom_imports may import them
    if isinstance(config, Config):
        name, cfg = config.filename or 'the config', copy.deepcopy(config)
    else:
        name, cfg = os.fspath(config), _read(os.fspath(config))
    if not cfg._imported_names:  # a config of texts: MMEngine could not write its classes into the work dir
        for key, value in list(cfg.items()):
            if inspect.isclass(value):
                cfg.pop(key)  # an import
            else:
                cfg[key] = _name_classes(value)
    if options:
        check_keys(cfg, options)
        try:
            cfg.merge_from_dict(options)
        except Exception as error:
            raise ToolError(f'--cfg-options do not fit {name!r}: {describe(error)}') from error

    scope = cfg.get('default_scope')
    if scope is None:  # configs in pure Python name classes instead of a scope
        scope = cfg.default_scope = next((name for name in SCOPES if name == _package_of(cfg.get('model'))), None)
    if scope not in SCOPES:
        raise ToolError(
            f'{name!r} has default_scope={scope!r}, expected one of {sorted(SCOPES)}; inherit a base config of '
            "the task, such as mmdet::_base_/default_runtime.py, or set default_scope='mmdet'"
        )
    if 'model' not in cfg:
        raise ToolError(f'{name!r} defines no model')
    if importlib.util.find_spec(scope) is None:
        raise ToolError(f'{name!r} needs {scope}, which is not installed: pip install {SCOPES[scope]}')
    init_default_scope(scope)
    return cfg


def _read(name: str) -> Config:
    path = Path(config_path(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name)
    if not path.is_file():
        ours = find_config(path.stem)
        hint = f', did you mean {PREFIX + ours!r}?' if ours else ''
        raise ToolError(f'there is no config {name!r}{hint} (working directory {Path.cwd()})')
    if path.suffix not in ('.py', '.json', '.yaml', '.yml'):
        raise ToolError(f'{name!r} is no config, which ends with .py, .json or .yaml: CONFIG comes before CHECKPOINT')
    try:
        return Config.fromfile(path)
    except Exception as error:
        raise ToolError(f'cannot read the config {name!r}: {describe(error)}') from error


def _name_classes(node: Any) -> Any:
    """A part of a config with the names of classes instead of the classes."""
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _name_classes(value)
        return node
    if isinstance(node, (list, tuple)):
        return type(node)(_name_classes(value) for value in node)
    return f'{node.__module__}.{node.__qualname__}' if inspect.isclass(node) else node


def _package_of(model: Any) -> str:
    """Package of the model's class, where the config holds the class."""
    kind = model.get('type') if isinstance(model, dict) else None
    return getattr(kind, '__module__', '').split('.')[0]


def apply_randomness(cfg: Config, seed: int | None, deterministic: bool) -> None:
    """``--seed`` and ``--deterministic``; changes ``cfg``."""
    randomness = {'seed': None, **(cfg.get('randomness') or {})}
    if seed is not None:
        randomness['seed'] = seed
    if deterministic:
        randomness['deterministic'] = True
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # PyTorch requires it on GPUs
    cfg.randomness = randomness


def apply_released(cfg: Config, path: str) -> None:
    """``tools/test.py CONFIG released``: load what was published for this config, found by its name; changes ``cfg``.

    Raises:
        ToolError: Nothing was published for this config.
        CheckpointError: See :func:`~vheat_mm.checkpoint.released.locate`.
    """
    release = find_released(Path(path).stem)
    if release is None:
        names = ', '.join(release.config for release in RELEASES)
        raise ToolError(
            f"'released': no checkpoint was published for {Path(path).stem}; give the path of one, or the name of one "
            f'that fits: {names}'
        )
    locate(release)  # that VHEAT_WEIGHTS lacks the file is said before the data is read
    cfg.load_from = release.name


def apply_resume(cfg: Config, resume: str | None) -> None:
    """``--resume [PATH]``; changes ``cfg``. What it means is decided when the run begins."""
    if resume is not None:
        cfg.resume, cfg.load_from = True, None if resume == 'auto' else resume


def apply_amp(cfg: Config) -> None:
    """``--amp``; changes ``cfg``.

    Raises:
        ToolError: The config uses another optimizer wrapper; detection on the CPU.
    """
    wrapper = cfg.optim_wrapper
    kind = type_name(wrapper) or 'OptimWrapper'
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ToolError(f'--amp replaces OptimWrapper only, and optim_wrapper.type is {kind!r}: drop --amp')
    if get_device() == 'cpu':
        check_cpu_amp(cfg)
        wrapper.type = 'CPUAmpOptimWrapper'
        wrapper.pop('loss_scale', None)
        return
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def check_cpu_amp(cfg: Config) -> None:
    """Refuse ``--amp`` on the CPU where the task's models cannot run with it there.

    Raises:
        ToolError: Detection.
    """
    if cfg.default_scope == 'mmdet':
        raise ToolError("--amp on the CPU: mmcv's operators do not support bfloat16 there; drop --amp")


def apply_auto_scale_lr(cfg: Config, path: str) -> None:
    """``--auto-scale-lr``; changes ``cfg``.

    Raises:
        ToolError: The config has no ``auto_scale_lr.base_batch_size``.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise ToolError(
            f'--auto-scale-lr: {path!r} does not say for which batch size its learning rate is: '
            'add auto_scale_lr=dict(base_batch_size=16), all GPUs together, or drop the flag'
        )
    cfg.auto_scale_lr.enable = True
