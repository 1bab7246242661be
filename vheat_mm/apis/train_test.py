"""``tools/train.py`` and ``tools/test.py`` for detection, segmentation and classification."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from vheat_mm.apis.config import (
    apply_amp,
    apply_auto_scale_lr,
    apply_randomness,
    apply_released,
    apply_resume,
    make_parser,
    read_config,
)
from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.apis.outputs import apply_out, apply_show
from vheat_mm.apis.tta import apply_tta
from vheat_mm.checkpoint.run import lock_work_dir
from vheat_mm.checkpoint.run_folder import release
from vheat_mm.engine import fileio
from vheat_mm.engine.hooks.annotation_check_hook import check_annotations
from vheat_mm.engine.runner.build import (
    add_fault_tolerance_hooks,
    add_hook,
    begin_run,
    build_runner,
    remove_hook,
    set_dataloader_defaults,
)
from vheat_mm.engine.runner.distributed import exit_process, tear_down_processes
from vheat_mm.engine.runner.environment import log_environment
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.process import exit_on_signals, process_rank

__all__ = ['exit_process', 'run_testing', 'run_training']


def run_training(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status: 0, 2 after an error message on stderr, 75 on SIGTERM."""
    parser = make_parser('Train a detector, segmentor or classifier.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue an interrupted training from this file or, without one, from the newest in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (on the CPU: bfloat16)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate with the batch size, from the config's auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        '--seed', type=int, help='of all random numbers; --resume keeps the seed of the interrupted run'
    )
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='bit-equal weights for the same seed: slower algorithms, and an error if an operator has none',
    )
    args = parser.parse_args(argv)

    def body() -> None:
        logging.raiseExceptions = False  # on a full disk, no traceback for each line of the log
        fileio.install()
        cfg = read_config(args)
        for field in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
            if not cfg.get(field):
                raise ToolError(f'{args.config!r} defines no {field}: it is not for training')
        if args.amp:
            apply_amp(cfg)
        if args.auto_scale_lr:
            apply_auto_scale_lr(cfg, args.config)
        apply_randomness(cfg, args.seed, args.deterministic)
        apply_resume(cfg, args.resume)
        notes = lock_work_dir(cfg.work_dir) if process_rank() == 0 else []  # before the runner writes into it
        set_dataloader_defaults(cfg)
        add_fault_tolerance_hooks(cfg)
        runner = build_runner(cfg, notes)
        begin_run(runner)
        log_environment(runner, sys.argv if argv is None else list(argv))
        check_annotations(runner, ['train', *([] if cfg.get('val_cfg') is None else ['val'])])
        runner.train()
        tear_down_processes()

    before = signal.getsignal(signal.SIGTERM)
    exit_on_signals()
    try:
        return run_reporting_errors(body)
    finally:
        release()
        if before in (signal.SIG_DFL, signal.SIG_IGN) and signal.getsignal(signal.SIGTERM) != before:
            signal.signal(signal.SIGTERM, before)  # not within tools/train.py, which exits now


def run_testing(argv: Sequence[str] | None = None) -> int:
    """Test; returns the exit status: 0, or 2 after an error message on stderr."""
    parser = make_parser('Test a detector, segmentor or classifier.')
    parser.add_argument(
        'checkpoint',
        help="checkpoint file, of this package or of the vHeat release; 'released' for the published one of the config",
    )
    parser.add_argument(
        '--out', help='write the predictions: a .pkl file, or for segmentation a folder for the label maps'
    )
    parser.add_argument('--show', action='store_true', help='show each test image with its prediction in a window')
    parser.add_argument('--show-dir', help='write each test image with its prediction into this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows an image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args = parser.parse_args(argv)

    def body() -> None:
        fileio.install()
        cfg = read_config(args)
        for field in ('test_dataloader', 'test_cfg', 'test_evaluator'):
            if cfg.get(field) is None:
                raise ToolError(f'{args.config!r} defines no {field}: it is not for testing')
        cfg.load_from, cfg.resume = args.checkpoint, False
        if args.checkpoint == 'released':
            apply_released(cfg, args.config)
        # state_dict holds the averaged weights already. With test-time augmentation, EMAHook (mmengine <= 0.10.7) fails
        # to load its own copy and would swap in random weights.
        remove_hook(cfg, 'EMAHook')
        add_hook(cfg, 'SkipBrokenSamplesHook')  # names the image that cannot be loaded
        if args.tta:
            apply_tta(cfg)
        if args.out:
            apply_out(cfg, args.out)
        if args.show or args.show_dir:
            apply_show(cfg, args.show, args.show_dir, args.wait_time)
        set_dataloader_defaults(cfg)
        runner = build_runner(cfg, [])
        check_annotations(runner, ['test'])
        runner.test()
        tear_down_processes()

    return run_reporting_errors(body)
