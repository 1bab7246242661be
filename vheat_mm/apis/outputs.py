"""``--out``, ``--show`` and ``--show-dir``: predictions as files and as images."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmengine.config import Config

from vheat_mm.engine.runner.build import is_type
from vheat_mm.utils.errors import ToolError


def apply_out(cfg: Config, out: str) -> None:
    """``--out``: a pickle of all predictions, or for segmentation a folder of label maps; changes ``cfg``.

    Raises:
        ToolError: ``out`` is no name of such a file or folder; segmentation without ``IoUMetric``.
    """
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    path = Path(out).absolute()
    if cfg.default_scope == 'mmseg':
        metrics = [e for e in evaluators if is_type(e, 'IoUMetric')]
        if not metrics:
            raise ToolError('--out: label maps are written by IoUMetric, which is not in test_evaluator')
        if path.is_file():
            raise ToolError(f'--out {out}: for segmentation it must be a folder for the label maps, and this is a file')
        metrics[0].output_dir = str(path)
        return
    if path.suffix not in ('.pkl', '.pickle') or path.is_dir():
        raise ToolError(f'--out {out}: expected the name of a .pkl or .pickle file for the predictions')
    dump = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    cfg.test_evaluator = [*evaluators, dict(type=dump, out_file_path=str(path))]


def apply_show(cfg: Config, show: bool, show_dir: str | None, wait_time: float, tta: bool) -> None:
    """``--show`` and ``--show-dir``: draw each test image with its prediction; changes ``cfg``.

    Raises:
        ToolError: The config has no visualization hook; no display; ``show_dir`` is a file; TTA under mmpretrain.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ToolError('--show and --show-dir: the config has no default_hooks.visualization; inherit the base config')
    if show and sys.platform == 'linux' and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        raise ToolError('--show needs a display (DISPLAY is not set): write the images with --show-dir instead')
    # The libraries would create relative folders below work_dir/<time>.
    folder = str(Path(show_dir).absolute()) if show_dir else None
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise ToolError(f'--show-dir {show_dir}: this is a file')
    if cfg.default_scope == 'mmpretrain':
        if tta:
            raise ToolError('mmpretrain cannot draw augmented images: drop --tta or --show / --show-dir')
        hook.update(enable=True, interval=1, show=show, wait_time=wait_time, out_dir=folder)
        return
    hook.update(draw=True, show=show, wait_time=wait_time, interval=1)
    if folder and cfg.default_scope == 'mmdet':
        hook.test_out_dir = folder
    elif folder:
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend', img_save_dir=folder)]
