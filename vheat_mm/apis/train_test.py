"""``tools/train.py`` and ``tools/test.py``: one pair for detection, segmentation and classification."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from vheat_mm.apis.config import (
    add_hook,
    add_robust_hooks,
    apply_amp,
    apply_auto_scale_lr,
    apply_randomness,
    apply_resume,
    drop_hook,
    fit_dataloaders,
    make_parser,
    read_config,
    shards,
)
from vheat_mm.apis.errors import SetupEndHook, run_reporting_errors
from vheat_mm.apis.outputs import apply_out, apply_show
from vheat_mm.apis.tta import apply_tta
from vheat_mm.engine import fileio as safe_io
from vheat_mm.engine.optimizers import cpu_amp as cpu_amp  # registers the optimizer wrapper
from vheat_mm.engine.runner.distributed import leave, paint_in_every_process, set_up_processes, tear_down_processes
from vheat_mm.engine.runner.provenance import log_provenance
from vheat_mm.utils.errors import ToolError

__all__ = ['leave', 'run_testing', 'run_training']


def run_training(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status: 0; 2 after a message on stderr; 75 on SIGTERM."""
    parser = make_parser('Train a detector, segmentor or classifier.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue an interrupted training: from this file or, without one, from the latest in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (on the CPU: bfloat16)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate with the batch size, from the config's auto_scale_lr.base_batch_size",
    )
    parser.add_argument('--seed', type=int, help='of all random numbers; --resume keeps that of the interrupted run')
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='bit-equal weights for the same seed: algorithms that are slower, and an error where there is none',
    )
    args = parser.parse_args(argv)

    def body(phase: SetupEndHook) -> None:
        logging.raiseExceptions = False  # of a log file on a full disk: else a traceback for each line
        safe_io.install()
        cfg = read_config(args)
        for field in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
            if not cfg.get(field):
                raise ToolError(f'{args.config!r} defines no {field}: it is not for training')
        if args.amp:
            apply_amp(cfg)
        if args.auto_scale_lr:
            apply_auto_scale_lr(cfg, args.config)
        apply_randomness(cfg, args.seed, args.deterministic)
        notes = apply_resume(cfg, args.resume)
        fit_dataloaders(cfg)
        add_robust_hooks(cfg)
        runner = build_runner(cfg, notes, phase)
        log_provenance(runner, sys.argv if argv is None else list(argv))
        runner.train()
        tear_down_processes()

    return run_reporting_errors(body)


def run_testing(argv: Sequence[str] | None = None) -> int:
    """Test as the command line says; returns the exit status (0, or 2 after a message on stderr)."""
    parser = make_parser('Test a detector, segmentor or classifier.')
    parser.add_argument('checkpoint', help='checkpoint file, of this package or of the vHeat release')
    parser.add_argument(
        '--out', help='write the predictions: a .pkl file, or for segmentation a folder for the label maps'
    )
    parser.add_argument('--show', action='store_true', help='show each test image with its prediction in a window')
    parser.add_argument('--show-dir', help='write each test image with its prediction into this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows an image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args = parser.parse_args(argv)

    def body(phase: SetupEndHook) -> None:
        safe_io.install()
        cfg = read_config(args)
        for field in ('test_dataloader', 'test_cfg', 'test_evaluator'):
            if cfg.get(field) is None:
                raise ToolError(f'{args.config!r} defines no {field}: it is not for testing')
        cfg.load_from, cfg.resume = args.checkpoint, False
        # A checkpoint's state_dict holds the average already. The hook would swap in a second copy of it, which under
        # test-time augmentation it fails to load (mmengine <= 0.10.7) and leaves at random.
        drop_hook(cfg, 'EMAHook')
        if args.tta:
            apply_tta(cfg)
        if args.out:
            apply_out(cfg, args.out)
        if args.show or args.show_dir:
            apply_show(cfg, args.show, args.show_dir, args.wait_time, args.tta)
        fit_dataloaders(cfg)
        runner = build_runner(cfg, [], phase)
        paint_in_every_process(runner)
        runner.test()
        tear_down_processes()

    return run_reporting_errors(body)


def build_runner(cfg: Config, notes: list[str], phase: SetupEndHook) -> Runner:
    """Join the other processes, build the runner with the checks of this package, and log ``notes``."""
    notes = notes + set_up_processes(cfg, cfg.launcher)
    if not shards(cfg):  # parts of weights do not compare with the whole
        add_hook(cfg, 'CheckpointCheckHook')
    add_hook(cfg, 'AnnotationCheckHook')
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(phase)
    for note in notes:
        runner.logger.info(note)
    return runner
