"""Soak test: trainings that are killed at random and resumed, against an undisturbed one; inference at random sizes.

    python .dev_scripts/soak.py train --minutes 60 --out work_dirs/soak
    python .dev_scripts/soak.py infer --minutes 60 --out work_dirs/soak

``train`` repeats: a small Mask R-CNN (by epoch) or UPerNet (by iteration) is trained by one or two processes, and
ended again and again: SIGKILL to all of its processes at a random moment, or in the middle of writing a checkpoint;
SIGKILL to one of them; SIGTERM to the launcher; SIGKILL and then corruption of the newest checkpoint. Each time it is
started with --resume. Its final weights must equal those of an undisturbed run, and no saved
checkpoint may be lost. ``infer`` watches the memory of a vHeat whose images never have the same size for long.

Writes train.json and infer.json; exits with 1 where anything was lost. Linux only, as it reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from vheat_mm import VHeat
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.resume import find_newest
from vheat_mm.checkpoint.verify import verify_file
from vheat_mm.utils.errors import REQUEUE, CheckpointError

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / 'demo'), str(REPO / 'tools' / 'analysis_tools')]

from benchmark_measure import resident  # noqa: E402
from make_demo_data import make_demo_data  # noqa: E402

from demo import child_environment, fresh_folder  # noqa: E402

TRAINS = b'Checkpoints will be saved'  # what MMEngine logs before the first iteration
SHORT = [
    'default_hooks.checkpoint.max_keep_ckpts=2',
    'train_dataloader.num_workers=1',
    'train_cfg.val_interval=1000000',
]
# config, its length in steps, what sets length and interval of checkpoints
RECIPES = {
    'epochs': (
        'configs/demo/mask-rcnn_vheat-demo_coins.py',
        6,
        ['train_cfg.max_epochs=6', 'default_hooks.checkpoint.interval=1', *SHORT],
    ),
    'iterations': (
        'configs/demo/vheat-demo_upernet_coins.py',
        60,
        ['train_cfg.max_iters=60', 'default_hooks.checkpoint.interval=7', *SHORT],
    ),
}
KINDS = ('all', 'saving', 'one', 'sigterm', 'corrupt')


def launch(recipe: str, processes: int, work_dir: Path, data: Path) -> subprocess.Popen:
    """Start (or go on with) a training; its output is added to ``<work_dir>.log``."""
    config, _, options = RECIPES[recipe]
    command = [str(REPO / 'tools' / 'dist_train.sh'), str(REPO / config), str(processes), '--work-dir', str(work_dir)]
    command += ['--seed', '1', '--resume', '--cfg-options', *options]
    with work_dir.with_suffix('.log').open('a') as log:
        return subprocess.Popen(
            command,
            cwd=REPO,
            env={**child_environment(data, processes), 'PYTHON': sys.executable},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def descendants(pid: int) -> list[int]:
    """All processes below a process, itself included, parents first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f'/proc/{parent}/task').iterdir():
                found += map(int, (task / 'children').read_text().split())
    return found


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Signal processes that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait(run: subprocess.Popen, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
    """Wait so many seconds or until a condition holds; False where the run has ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        if run.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def interrupt(run: subprocess.Popen, kind: str, work_dir: Path, rng: random.Random, counts: Counter) -> None:
    """End a run in one of the ways of :data:`KINDS`, unless it ends before."""
    if kind == 'saving':
        saved = set(work_dir.glob('*.pth'))
        alive = rng.random() < 0.3 or wait(
            run, 120, lambda: not saved >= set(work_dir.glob('*.pth'))
        )  # the next but one
        alive = alive and wait(run, 120, lambda: any(work_dir.glob('.*.pth.*.part')))
    else:  # mostly while it trains, sometimes while it starts
        log = work_dir.with_suffix('.log')
        begun = log.stat().st_size
        alive = rng.random() < 0.2 or wait(run, 120, lambda: TRAINS in log.read_bytes()[begun:])
        alive = alive and wait(run, rng.uniform(0, 25))
    if not alive:
        if status := run.wait():
            raise AssertionError(f'{work_dir}.log: the run ended by itself with status {status}')
        return
    counts[kind] += 1
    if kind == 'sigterm':
        kill([run.pid], signal.SIGTERM)
        status = run.wait(timeout=120)
        counts['SIGTERM before training, nothing to save'] += status == 128 + signal.SIGTERM
        if status not in (REQUEUE, 0, 128 + signal.SIGTERM):
            raise AssertionError(f'SIGTERM: status {status}')
        return
    below = descendants(run.pid)
    workers = [pid for pid in below if b'train.py' in _command(pid) and b'dist_run.py' not in _command(pid)]
    kill([rng.choice(workers)] if kind == 'one' and workers else below)
    if kind == 'one' and run.wait(timeout=120) == 0:
        counts['one process killed as the run ended'] += 1
    run.wait(timeout=120)
    kill(below)
    if kind == 'saving':
        counts['saves interrupted'] += any(work_dir.glob('.*.pth.*.part'))


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f'/proc/{pid}/cmdline').read_bytes()
    return b''


def newest_iteration(work_dir: Path) -> tuple[int, str | None]:
    """Iteration of the newest intact checkpoint, -1 without one; and its path."""
    path, _ = find_newest(work_dir)
    return (-1, None) if path is None else (read_checkpoint(path)['meta']['iter'], path)


def is_intact(path: Path) -> bool:
    try:
        verify_file(path)
    except CheckpointError:
        return False
    return True


def corrupt(path: str, rng: random.Random) -> str:
    """Cut a file off or flip one bit of a tensor in it."""
    content = bytearray(Path(path).read_bytes())
    if rng.random() < 0.5:
        content = content[: rng.randrange(1, len(content))]
        what = 'cut off'
    else:
        content[len(content) // 2] ^= 1 << rng.randrange(8)
        what = 'one bit flipped'
    Path(path).write_bytes(content)
    return what


def reference(recipe: str, processes: int, out: Path, data: Path) -> dict[str, torch.Tensor]:
    """Weights of the undisturbed run."""
    work_dir = out / f'undisturbed_{recipe}_{processes}'
    if launch(recipe, processes, work_dir, data).wait() != 0:
        raise AssertionError(f'the undisturbed run failed: {work_dir}.log')
    return final_weights(work_dir)


def final_weights(work_dir: Path) -> dict[str, torch.Tensor]:
    path = find_newest(work_dir)[0]
    assert path is not None
    return read_checkpoint(path)['state_dict']


def train_with_interruptions(
    recipe: str, processes: int, work_dir: Path, data: Path, rng: random.Random, counts: Counter
) -> None:
    """One training, interrupted at random until it finishes.

    Raises AssertionError where a checkpoint was lost, or a status is none of those documented.
    """
    reached = -1
    while True:
        run = launch(recipe, processes, work_dir, data)
        kind = rng.choice(KINDS)
        counts['starts'] += 1
        interrupt(run, kind, work_dir, rng, counts)
        status = run.wait()
        now, path = newest_iteration(work_dir) if work_dir.exists() else (-1, None)
        if now < reached:
            raise AssertionError(
                f'{work_dir}: iteration {reached} was saved, but the newest intact checkpoint is of iteration {now}'
            )
        reached = now
        print(f'  {work_dir.name}: interrupted by {kind}, status {status}, saved up to iteration {now}', flush=True)
        if status == 0:
            return
        if kind == 'corrupt' and path is not None and sum(map(is_intact, work_dir.glob('*.pth'))) > 1:
            what = corrupt(path, rng)
            before = reached
            reached, other = newest_iteration(work_dir)
            if other == path:
                raise AssertionError(f'{path}: {what}, but the file was taken for intact')
            counts[f'corrupted, {what}'] += 1
            print(f'  {Path(path).name} {what}: iteration {before} -> {reached}', flush=True)


def soak_training(minutes: float, out: Path, seed: int) -> dict:
    """See the module's docstring; returns the figures."""
    data = out / 'data'
    make_demo_data(data, num_train=32, num_val=4)
    rng, counts = random.Random(seed), Counter()
    undisturbed: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    worst, end = 0.0, time.monotonic() + minutes * 60
    while time.monotonic() < end:
        recipe, processes = rng.choice(list(RECIPES)), rng.choice((1, 2))
        if (recipe, processes) not in undisturbed:
            undisturbed[recipe, processes] = reference(recipe, processes, out, data)
            print(f'{recipe}, {processes} processes, undisturbed: done', flush=True)
        work_dir = out / f'run_{counts["trainings"]}_{recipe}_{processes}'
        train_with_interruptions(recipe, processes, work_dir, data, rng, counts)
        counts['trainings'] += 1
        ours, theirs = final_weights(work_dir), undisturbed[recipe, processes]
        if ours.keys() != theirs.keys() or list(work_dir.glob('.*.part')):
            raise AssertionError(f'{work_dir}: other weights than the undisturbed run, or temporary files are left')
        difference = max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)
        worst = max(worst, difference)
        print(f'{work_dir.name}: finished; differs by {difference:.1e} from the undisturbed run', flush=True)
        for file in work_dir.glob('*.pth'):
            file.unlink()
    return dict(counts=dict(sorted(counts.items())), largest_difference=worst)


def soak_inference(minutes: float, seed: int) -> dict:
    """Run a small vHeat at random sizes; returns the memory over time in MB and the cache's size.

    The C library keeps freed memory until malloc_trim is called: figures are taken before and after it.

    Raises AssertionError where memory in use goes on growing, or the cache outgrows its limit.
    """
    rng, model = random.Random(seed), VHeat(arch=dict(embed_dims=32, depths=(1, 1, 2, 1)), img_size=256).eval()
    model.decay_cache.max_bytes = limit = 32 * 2**20
    start, samples = time.monotonic(), 20
    images, largest = 0, 0
    sizes: set[tuple[int, int]] = set()
    kept, in_use = [], []
    while (passed := time.monotonic() - start) < minutes * 60:
        size = (rng.randrange(32, 800), rng.randrange(32, 800))
        with torch.inference_mode():
            outputs = model(torch.randn(rng.choice((1, 2)), 3, *size))
        assert all(torch.isfinite(output).all() for output in outputs), f'not finite at {size}'
        images, largest = images + len(outputs[0]), max(largest, model.decay_cache.nbytes)
        sizes.add(size)
        if passed >= (len(in_use) + 1) * minutes * 60 / (samples + 1):
            del outputs
            kept.append(round(resident('VmRSS') / 2**20, 1))
            ctypes.CDLL(None).malloc_trim(0)
            in_use.append(round(resident('VmRSS') / 2**20, 1))
            print(f'  {passed:6.0f} s  {images} images  {len(sizes)} sizes  {kept[-1]} / {in_use[-1]} MB', flush=True)
    assert largest <= limit, f'the decay cache holds {largest} bytes, over its limit of {limit}'
    before, after = max(in_use[samples // 4 : samples // 2]), max(in_use[-samples // 4 :])
    assert after <= 1.05 * before, f'memory in use grows: {in_use} MB'
    return dict(
        images=images,
        sizes=len(sizes),
        resident_mb=kept,
        resident_after_trim_mb=in_use,
        decay_cache_mb=round(largest / 2**20, 1),
        decay_cache_limit_mb=limit // 2**20,
    )


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('train', 'infer'))
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/soak'), help='a folder of its own; replaced')
    parser.add_argument('--seed', type=int, default=0, help='of the moments and sizes')
    args = parser.parse_args()
    out = args.out.absolute() / args.what
    fresh_folder(out)
    try:
        figures = (
            soak_training(args.minutes, out, args.seed)
            if args.what == 'train'
            else soak_inference(args.minutes, args.seed)
        )
    except (AssertionError, CheckpointError) as failure:
        print(f'FAILED: {failure}', file=sys.stderr)
        return 1
    figures |= dict(
        minutes=args.minutes,
        seed=args.seed,
        torch=torch.__version__,
        machine=platform.processor() or platform.machine(),
    )
    (args.out / f'{args.what}.json').write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main())
