"""Demo on a small data set composed from photographs: train, test, draw predictions, report.

    python demo/demo.py {detection,segmentation,classification} [--out demo_out]

Makes the data, trains from scratch with tools/dist_train.sh, tests with tools/dist_test.sh, and
writes pictures of the predictions and curves below --out. Exits with 1 where training, testing or the
expected quality fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from make_demo_data import DemoDataError, make_demo_data

REPO = Path(__file__).resolve().parents[1]
KEY_LABELS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
MARKER = '.vheat_mm-demo'  # marks a folder that the demo made and may replace


class DemoError(Exception):
    """A message for the user, without a traceback."""


@dataclass(frozen=True)
class Task:
    """One demo: its config and, by the name a run reports, each figure's label and target."""

    config: str
    metrics: dict[str, tuple[str, float | None]]


TASKS = {
    'detection': Task(
        'configs/demo/mask-rcnn_vheat-demo_coins.py',
        {
            'coco/bbox_mAP': ('box AP', None),
            'coco/bbox_mAP_50': ('box AP50', None),
            'coco/segm_mAP': ('mask AP', 0.5),
            'coco/segm_mAP_50': ('mask AP50', 0.85),
        },
    ),
    'segmentation': Task(
        'configs/demo/vheat-demo_upernet_coins.py',
        {'mIoU': ('mIoU', 75.0), 'mAcc': ('mean accuracy', None), 'aAcc': ('pixel accuracy', None)},
    ),
    'classification': Task('configs/demo/vheat-demo_textures.py', {'accuracy/top1': ('accuracy', 85.0)}),
}


def progress(line: str) -> str | None:
    """Shorten a line of MMEngine's log to epoch or iteration, loss and main scores; None for other lines."""
    place = re.search(r'(?:Epoch|Iter)\((?:train|val)\)\s+(?:\[[\d/ ]+\])+', line)
    values = re.findall(r'(?<!\S)(loss|eta|coco/(?:bbox|segm)_mAP|mIoU|accuracy/top1): (\S+)', line)
    if not place or not values or {key for key, _ in values} == {'eta'}:
        return None
    return '  '.join([place.group(), *(f'{KEY_LABELS.get(key, key)} {value}' for key, value in sorted(values))])


def run_logged(command: list[str], log: Path, env: dict[str, str]) -> None:
    """Run ``command`` in the repository; all output goes to ``log``, its progress to the screen.

    Raises DemoError with the end of the log where the command fails.
    """
    with (
        log.open('w', encoding='utf-8') as file,
        subprocess.Popen(
            command,
            cwd=REPO,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if shown := progress(line):
                print(f'      {shown}', flush=True)
    if process.returncode:
        tail = '\n'.join(log.read_text(encoding='utf-8').splitlines()[-25:])
        raise DemoError(f'{tail}\n{" ".join(command)}\nfailed with {process.returncode}; log: {log}')


def child_environment(data: Path, processes: int) -> dict[str, str]:
    """Environment with this interpreter first, the demo's data and an equal share of the cores per process."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        **os.environ,
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}',
        'VHEAT_DEMO_DATA': str(data),
        'OMP_NUM_THREADS': str(threads),
        'PYTHONUNBUFFERED': '1',
    }


def fresh_folder(folder: Path) -> Path:
    """Make an empty folder; that of an earlier demo is replaced, any other is refused."""
    if folder.exists():
        if not (folder / MARKER).is_file():
            raise DemoError(f'{folder} exists and is not of this demo; choose another with --out')
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def newest(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise DemoError(f'the run left no {pattern} in {folder}')
    return found[-1]


def relative(path: Path) -> str:
    return os.path.relpath(path)


def report(task: Task, results: dict[str, float], files: dict[str, Path], seconds: float) -> bool:
    """Print the closing table; True where every target is reached."""
    reached = True
    print(f'\n{"":2}{"figure":<16}{"result":>8}{"target":>10}')
    for key, (label, target) in task.metrics.items():
        verdict = ''
        if target is not None:
            # A figure that is NaN or absent has not reached its target.
            good = results.get(key, float('nan')) >= target
            reached &= good
            verdict = f'{f">= {target:g}":>10}  {"reached" if good else "MISSED"}'
        print(f'  {label:<16}{results.get(key, float("nan")):>8.3f}{verdict}')
    print()
    for label, path in files.items():
        print(f'  {label:<22} {relative(path)}')
    print(f'  {"time":<22} {seconds // 60:.0f} min {seconds % 60:02.0f} s')
    return reached


def demo(name: str, out: Path, processes: int) -> bool:
    """Run one task's demo below ``out``; True where its targets are reached."""
    start = time.monotonic()
    task = TASKS[name]
    folder = fresh_folder(out / name)
    environment = child_environment(out / 'data', processes)

    print(f'[1/4] data: coins on brick, grass and gravel -> {relative(out / "data")}', flush=True)
    make_demo_data(out / 'data')

    print(f'[2/4] tools/dist_train.sh {task.config} {processes}', flush=True)
    work_dir = folder / 'train'
    run_logged(
        ['bash', 'tools/dist_train.sh', task.config, str(processes), '--work-dir', str(work_dir)],
        folder / 'train.log',
        environment,
    )
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())

    print(f'[3/4] tools/dist_test.sh {task.config} {relative(checkpoint)} {processes}', flush=True)
    test_dir = folder / 'test'
    run_logged(
        [
            *('bash', 'tools/dist_test.sh', task.config, str(checkpoint), str(processes)),
            *('--work-dir', str(test_dir), '--show-dir', str(folder / 'predictions')),
        ],
        folder / 'test.log',
        environment,
    )
    results = json.loads(newest(test_dir, '*/*.json').read_text())

    print('[4/4] pictures', flush=True)
    # mmdet keeps the images' names and type, the others write PNG, in folders of the visualizer or of the classes.
    pictures = list((folder / 'predictions').glob('**/*.[jp][pn]g'))
    tools = REPO / 'tools' / 'visualization'
    worst = folder / 'predictions.png'
    run_logged(
        [sys.executable, str(tools / 'heat.py'), 'predictions', task.config, str(checkpoint), '--out', str(worst)],
        folder / 'pictures.log',
        environment,
    )
    run_logged(
        [
            *(sys.executable, str(tools / 'plot_curves.py'), str(work_dir), '--out', str(folder / 'curves.png')),
            *('--title', f'vHeat demo: {name}, from scratch'),
        ],
        folder / 'plot.log',
        environment,
    )
    files = {
        'predictions, worst six': worst,
        f'predictions, all {len(pictures)}': folder / 'predictions',
        'loss and score curves': folder / 'curves.png',
        'checkpoint': checkpoint,
    }
    return report(task, results, files, time.monotonic() - start)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train and test on a small data set, end to end.')
    parser.add_argument('task', choices=TASKS, help='which demo to run')
    parser.add_argument('--out', type=Path, default=Path('demo_out'), help='folder for all results')
    parser.add_argument('--processes', type=int, default=2, help='processes of the launcher')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        if args.processes < 1:
            raise DemoError(f'--processes {args.processes}: at least one is needed')
        return 0 if demo(args.task, args.out.resolve(), args.processes) else 1
    except (DemoError, DemoDataError, OSError) as error:
        print(f'demo: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
