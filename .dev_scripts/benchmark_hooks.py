"""Training iterations with every hook of ``tools/train.py`` against MMEngine's own hooks, in turns in one process.

    python .dev_scripts/benchmark_hooks.py configs/demo/mask-rcnn_vheat-demo_coins.py --rounds 6

Prints the median CPU time of an iteration for both, data loading included, and their ratio. CPU time of one thread
holds still on a busy machine. The demo's configs need its data: ``python demo/make_demo_data.py`` and VHEAT_DEMO_DATA.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from vheat_mm.engine.runner.build import add_fault_tolerance_hooks, build_runner
from vheat_mm.utils.torchvision import ensure_torchvision

WARM_UP = 5  # iterations


class IterationTimes(Hook):
    """Collects the CPU time from the start of each iteration to the start of the next one."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Take the time."""
        self.starts.append(time.process_time())

    def times(self) -> list[float]:
        """Of all iterations but the first few, in seconds."""
        starts = self.starts[WARM_UP:]
        return [after - before for before, after in itertools.pairwise(starts)]


def train(path: str, ours: bool, name: str, iterations: int) -> list[float]:
    """Train for so many iterations; returns their times."""
    cfg = Config.fromfile(path)
    cfg.update(launcher='none', experiment_name=name, log_level='ERROR')
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=10 * iterations)
    cfg.visualizer.name = name  # a visualizer of a known name would write into the first run's folder
    cfg.param_scheduler = []
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=10 * iterations)
    clock = IterationTimes()
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        if ours:
            add_fault_tolerance_hooks(cfg)
            runner = build_runner(cfg, [])
        else:
            runner = Runner.from_cfg(cfg)
        runner.register_hook(clock, 'VERY_HIGH')
        runner.train()
    return clock.times()


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--rounds', type=int, default=6, help='trainings of each kind')
    parser.add_argument('--iterations', type=int, default=30, help='of each training')
    args = parser.parse_args()
    torch.set_num_threads(1)
    ensure_torchvision()
    init_default_scope(Config.fromfile(args.config).default_scope)
    found: dict[bool, list[float]] = {True: [], False: []}
    ratios = []
    for number in range(args.rounds):
        medians = {}
        for ours in (True, False) if number % 2 else (False, True):
            times = train(args.config, ours, f'{Path(args.config).stem}-{number}-{ours}', args.iterations)
            found[ours] += times
            medians[ours] = statistics.median(times)
        ratios.append(medians[True] / medians[False])
        print(f'round {number + 1}: {medians[True]:.4f} s with all hooks, {medians[False]:.4f} s with MMEngine alone')
    with_hooks, stock = statistics.median(found[True]), statistics.median(found[False])
    spread = f'{min(ratios):.3f} to {max(ratios):.3f} in {args.rounds} rounds'
    print(f'iteration: {with_hooks:.4f} s over {stock:.4f} s = {with_hooks / stock:.3f} ({spread})')


if __name__ == '__main__':
    main()
