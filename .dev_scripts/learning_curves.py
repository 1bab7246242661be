"""Learning curves of record: vHeat-T and Swin-T Mask R-CNN from scratch, same schedule, seed and data.

    python .dev_scripts/learning_curves.py coins [--out work_dirs/learning_curves]
    python .dev_scripts/learning_curves.py nuts --data FOLDER_WITH_trainval.json_AND_images
    python .dev_scripts/learning_curves.py coins --full      # tiny instead of a third of its width: for GPUs

Trains both models with tools/train.py, one after the other, and leaves curves.png, curves.json (scores by epoch,
commands) and the runs below --out. An earlier comparison on the same data set is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use('Agg')
import matplotlib.pyplot as plt

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / 'demo'), str(REPO / 'tools' / 'visualization')]

from make_demo_data import make_demo_data  # noqa: E402
from plot_curves import collect, read_records  # noqa: E402

from demo import DemoError, fresh_folder, run_logged  # noqa: E402

MODELS = dict(vheat='vHeat', swin='Swin')
COLORS = dict(vheat='tab:red', swin='tab:blue')
METRICS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
FULL = dict(
    vheat=['model.backbone.arch=tiny'],
    swin=['model.backbone.embed_dims=96', 'model.backbone.depths=(2,2,6,2)', 'model.backbone.num_heads=(3,6,12,24)'],
)
FULL_NECK = 'model.neck.in_channels=[96,192,384,768]'


class CurveError(Exception):
    """A message for the user, without a traceback."""


def split_coco(source: Path, target: Path) -> None:
    """Make the demo's layout from a COCO folder (``trainval.json``, ``images/``): every third image validates.

    Raises:
        CurveError: No such folder, or not laid out like that.
    """
    try:
        coco = json.loads((source / 'trainval.json').read_text(encoding='utf-8'))
        images = sorted(coco['images'], key=lambda image: image['id'])
        parts = {'train': [m for i, m in enumerate(images) if i % 3], 'val': images[::3]}
        for name, chosen in parts.items():
            ids = {image['id'] for image in chosen}
            annotations = [a for a in coco['annotations'] if a['image_id'] in ids]
            (target / 'coco' / name).mkdir(parents=True, exist_ok=True)
            for image in chosen:
                shutil.copyfile(source / 'images' / image['file_name'], target / 'coco' / name / image['file_name'])
            file = target / 'coco' / 'annotations' / f'instances_{name}.json'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(dict(coco, images=chosen, annotations=annotations)), encoding='utf-8')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CurveError(
            f'{source} is no COCO folder with trainval.json and images/ ({type(error).__name__}: {error}): '
            'name one with --data'
        ) from error


def train(model: str, dataset: str, args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Train one model; returns its work directory and the command."""
    work_dir = args.out / dataset / model
    options = ['randomness.seed=0', *(FULL[model] + [FULL_NECK] if args.full else [])]
    if args.epochs:
        options += [f'train_cfg.max_epochs={args.epochs}', f'param_scheduler.1.T_max={args.epochs}']
        options += [f'param_scheduler.1.end={args.epochs}']
    command = [
        *('tools/train.py', f'configs/demo/mask-rcnn_{model}-demo_{dataset}.py', '--work-dir', str(work_dir)),
        *('--cfg-options', *options),
    ]
    environment = {**os.environ, 'VHEAT_DEMO_DATA': str(args.out / 'data' / dataset), 'PYTHONUNBUFFERED': '1'}
    log = args.out / dataset / f'{model}.log'
    print(f'{MODELS[model]}: python {" ".join(command)}', flush=True)
    run_logged([sys.executable, *command], log, environment)
    return work_dir, ['python', *command]


def draw(runs: dict[str, dict], title: str, target: Path) -> None:
    """Loss and the two APs, both models in each panel."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout='constrained')
    for model, run in runs.items():
        style = dict(color=COLORS[model], label=MODELS[model])
        loss = run['loss']
        axes[0].plot(list(map(int, loss)), list(loss.values()), **style)
        for axis, (metric, label) in zip(axes[1:], METRICS.items(), strict=True):
            curve = run['metrics'][metric]
            style['label'] = f'{MODELS[model]}: {list(curve.values())[-1]:.3f}'
            axis.plot(list(map(int, curve)), list(curve.values()), marker='o', markersize=4, **style)
            axis.set(title=label, xlabel='epoch', ylim=(0, 1))
    axes[0].set(title='training loss', xlabel='iteration', yscale='log')
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def compare(dataset: str, args: argparse.Namespace) -> Path:
    """Train both models on one data set and draw them; returns the picture."""
    data = args.out / 'data' / dataset
    if dataset == 'coins':
        make_demo_data(data)
    else:
        split_coco(args.data, data)
    fresh_folder(args.out / dataset)
    runs = {}
    for model in MODELS:
        work_dir, command = train(model, dataset, args)
        losses, metrics, _ = collect(read_records(work_dir))
        missing = [metric for metric in METRICS if metric not in metrics]
        if missing:
            raise CurveError(f'{work_dir}: the log has no {", ".join(missing)}')
        runs[model] = dict(
            command=' '.join(command).replace(str(args.out), 'OUT'),
            loss=dict(sorted(losses['loss'].items())),
            metrics={metric: dict(sorted(metrics[metric].items())) for metric in METRICS},
        )
    width = 'tiny' if args.full else 'a third of tiny'
    target = args.out / dataset / 'curves.png'
    draw(runs, f'Mask R-CNN from scratch on {dataset}, seed 0, width: {width}', target)
    record = dict(dataset=dataset, width=width, python=platform.python_version(), machine=platform.machine(), runs=runs)
    target.with_suffix('.json').write_text(json.dumps(record, indent=1), encoding='utf-8')
    return target


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('dataset', choices=['coins', 'nuts'])
    parser.add_argument('--data', type=Path, help='of nuts: folder with trainval.json and images/')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/learning_curves'), help='folder for all results')
    parser.add_argument('--full', action='store_true', help='tiny at its full width and depth')
    parser.add_argument('--epochs', type=int, help="instead of the config's")
    args = parser.parse_args(argv)
    if (args.dataset == 'nuts') != (args.data is not None):
        parser.error('--data goes with nuts, and nuts needs it')
    if args.epochs is not None and args.epochs < 1:
        parser.error(f'--epochs {args.epochs}: at least 1')
    args.out = args.out.resolve()
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    try:
        print(compare(args.dataset, args))
    except (CurveError, DemoError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
