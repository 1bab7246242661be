"""Draw the loss and validation curves of any MMEngine run.

    python tools/visualization/plot_curves.py WORK_DIR [--out curves.png]

Reads every ``vis_data/scalars.json`` below WORK_DIR, so a run that was killed and resumed is one
curve: where two runs logged the same step, the later one counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use('Agg')
import matplotlib.pyplot as plt

# What a paper's table shows; everything else a run reports is drawn only where none of these is.
HEADLINE = re.compile(r'(bbox|segm)_mAP(_50)?$|^(mIoU|mAcc|aAcc)$|^accuracy/top[15]$|^(AP|PQ)$', re.IGNORECASE)
NAMES = {
    'coco/bbox_mAP': 'box AP',
    'coco/bbox_mAP_50': 'box AP50',
    'coco/segm_mAP': 'mask AP',
    'coco/segm_mAP_50': 'mask AP50',
    'accuracy/top1': 'top-1 accuracy',
    'accuracy/top5': 'top-5 accuracy',
}
NOT_METRICS = {'step', 'time', 'data_time', 'iter', 'epoch', 'lr', 'memory', 'base_lr'}

Curves = dict[str, dict[int, float]]  # name -> step -> value


class PlotError(Exception):
    """A message for the user, without a traceback."""


def read_records(work_dir: Path) -> list[dict]:
    """All logged records of a work directory, oldest run first.

    Raises PlotError where there is no log. A last line cut off by a crash is passed over.
    """
    if not work_dir.is_dir():
        raise PlotError(f'{work_dir}: no such directory')
    logs = sorted(work_dir.glob('**/vis_data/scalars.json'), key=lambda p: p.parts)
    if not logs:
        raise PlotError(f'{work_dir}: no vis_data/scalars.json below it; is it a work directory?')
    records = []
    for log in logs:
        for line in log.read_text(encoding='utf-8').splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def collect(records: list[dict]) -> tuple[Curves, Curves, str]:
    """Split records into training losses by iteration and validation metrics.

    Returns (losses, metrics, unit), where unit says what the metrics' steps count: 'epoch' or
    'iteration'.
    """
    losses: Curves = {}
    metrics: Curves = {}
    by_epoch = any('epoch' in record for record in records)
    for record in records:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        if 'lr' in record or any(name.startswith('loss') for name in record):
            for name, value in numbers.items():
                if 'loss' in name.rpartition('.')[2]:
                    losses.setdefault(name, {})[int(record['step'])] = value
        elif 'step' in record:
            for name, value in numbers.items():
                # Class-agnostic -1 means COCO had no object of that size: nothing to draw.
                if name not in NOT_METRICS and value != -1:
                    metrics.setdefault(name, {})[int(record['step'])] = value
    if not losses and not metrics:
        raise PlotError('the logs hold neither a loss nor a metric yet')
    headline = {name: curve for name, curve in metrics.items() if HEADLINE.search(name)}
    return losses, headline or metrics, 'epoch' if by_epoch else 'iteration'


def draw_losses(axes: plt.Axes, losses: Curves) -> None:
    """The total in bold, its parts below, on a logarithmic axis."""
    for name, curve in sorted(losses.items(), key=lambda item: item[0] != 'loss'):
        steps = sorted(curve)
        is_total = name == 'loss'
        axes.plot(
            steps,
            [curve[step] for step in steps],
            label='total' if is_total else name.replace('loss_', '').replace('decode.', ''),
            linewidth=2.2 if is_total else 1.1,
            color='black' if is_total else None,
        )
    axes.set(title='Training loss', xlabel='iteration', ylabel='loss (log scale)', yscale='log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter(lambda value, _: f'{value:g}' if f'{value:e}'[0] in '25' else '')
    axes.set_ylim(top=axes.get_ylim()[1] * 3)  # room for the legend
    axes.legend(frameon=False, fontsize=9, loc='upper right', ncols=3)


def draw_metrics(axes: plt.Axes, metrics: Curves, unit: str) -> None:
    """One line per metric, the last value written at its end."""
    for name, curve in metrics.items():
        steps = sorted(curve)
        last = curve[steps[-1]]
        label = f'{NAMES.get(name, name)}: {last:.3f}' if last <= 1 else f'{name}: {last:.1f}'
        axes.plot(steps, [curve[step] for step in steps], marker='o', markersize=4, label=label)
    is_fraction = all(value <= 1 for curve in metrics.values() for value in curve.values())
    axes.set(
        title='Validation',
        xlabel=unit,
        ylabel='score (0 to 1)' if is_fraction else 'score (%)',
        ylim=(0, 1 if is_fraction else 100),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9, loc='lower right')


def plot_curves(work_dir: Path, out: Path, title: str | None = None) -> Path:
    """Write the figure for ``work_dir`` to ``out`` (its suffix names the format) and return it."""
    losses, metrics, unit = collect(read_records(work_dir))
    panels = [bool(losses), bool(metrics)]
    figure, axes = plt.subplots(1, sum(panels), figsize=(6.4 * sum(panels), 4.6), squeeze=False, layout='constrained')
    free = list(axes[0])
    if losses:
        draw_losses(free.pop(0), losses)
    if metrics:
        draw_metrics(free.pop(0), metrics, unit)
    for panel in axes[0]:
        panel.grid(alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title or work_dir.resolve().name, fontsize=13)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return out


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Loss and validation curves of an MMEngine run.')
    parser.add_argument('work_dir', type=Path, help='work directory of the run')
    parser.add_argument('--out', type=Path, help='figure to write (default: WORK_DIR/curves.png)')
    parser.add_argument('--title', help="heading (default: the work directory's name)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        print(plot_curves(args.work_dir, args.out or args.work_dir / 'curves.png', args.title))
    except (PlotError, OSError, ValueError) as error:
        print(f'plot_curves: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
