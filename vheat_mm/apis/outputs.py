"""``--out``, ``--show`` and ``--show-dir``: predictions as files and as images."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vheat_mm.utils.errors import ToolError


def apply_out(cfg: Config, out: str) -> None:
    """``--out``: a pickle of all predictions, or for segmentation a folder of label maps; changes ``cfg``.

    Raises:
        ToolError: ``out`` is no name of such a file or folder.
    """
    path = Path(out).absolute()
    if cfg.default_scope == 'mmseg':
        if path.is_file():
            raise ToolError(f'--out {out}: for segmentation it must be a folder for the label maps, and this is a file')
        _add_hook(cfg, map_dir=str(path))
        return
    if path.suffix not in ('.pkl', '.pickle') or path.is_dir():
        raise ToolError(f'--out {out}: expected the name of a .pkl or .pickle file for the predictions')
    dump = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    cfg.test_evaluator = [*evaluators, dict(type=dump, out_file_path=str(path))]


def apply_show(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """``--show`` and ``--show-dir``: draw each test image with its prediction; changes ``cfg``.

    Raises:
        ToolError: The config has no visualizer; no display; ``show_dir`` is a file.
    """
    if not cfg.get('visualizer'):
        raise ToolError('--show and --show-dir: the config has no visualizer; inherit the base config of the task')
    if show and sys.platform == 'linux' and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        raise ToolError('--show needs a display (DISPLAY is not set): write the images with --show-dir instead')
    folder = Path(show_dir).absolute() if show_dir else None
    if folder and folder.exists() and not folder.is_dir():
        raise ToolError(f'--show-dir {show_dir}: this is a file')
    options: dict[str, Any] = {}
    threshold = (cfg.get('default_hooks', {}).get('visualization') or {}).get('score_thr')
    if threshold is not None:
        options['pred_score_thr'] = threshold
    _add_hook(cfg, image_dir=folder and str(folder), show=show, wait_time=wait_time, options=options)


def _add_hook(cfg: Config, **arguments: Any) -> None:
    hook = dict(type='mmengine.WritePredictionsHook', **arguments)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
