"""The three published tables again: vHeat-T/S/B next to Swin-T/S/B, counted and measured here.

    python .dev_scripts/compare_backbones.py [--tasks classification detection segmentation] [--sizes t s b]
    python .dev_scripts/compare_backbones.py --page docs/costs.md       # fill the page's tables

Parameters and FLOPs are counted as get_flops.py does; images per second are measured, vHeat and Swin of a size in
turns, batch 1 (classification: --batch-size). Published figures come from the metafiles and stand in columns of
their own.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from tqdm import tqdm

from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import atomic_file
from vheat_mm.utils.torchvision import ensure_torchvision

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / 'tools' / 'analysis_tools'))

from benchmark_measure import take_turns, timed  # noqa: E402
from benchmark_report import cpu_name  # noqa: E402
from get_flops import SHAPES, Cost, build, count, make_input  # noqa: E402

TASKS = dict(classification='mmpretrain', detection='mmdet', segmentation='mmseg')
HEADINGS = (
    'model', 'params', 'params, published', 'FLOPs', 'FLOPs, published', 'deployed: params', 'FLOPs', 'images/s, here',
    'images/s on A100, published',
)  # fmt: skip


def published(task: str, size: str) -> list[dict[str, Any]]:
    """Rows of a task's metafile for vHeat and Swin of a size, each model once.

    Raises:
        ToolError: The metafile is missing or has no such rows.
    """
    path = REPO / 'configs' / task / 'metafile.yml'
    try:
        rows = yaml.safe_load(path.read_text(encoding='utf-8'))['Models']
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ToolError(f'{path} is no metafile with Models: {error}') from error
    wanted = {}
    for row in rows:
        architecture = row['Metadata']['Architecture'][0]
        if architecture.lower() in (f'vheat-{size}', f'swin-{size}'):
            wanted.setdefault(architecture, row)
    if len(wanted) != 2:
        raise ToolError(f'{path} lacks vHeat-{size.upper()} or Swin-{size.upper()}: found {sorted(wanted)}')
    return [wanted[name] for name in sorted(wanted, key=str.lower, reverse=True)]


def load(name: str) -> Config:
    """A config of ours by path, or of another package as ``package::path``."""
    return get_config(name) if '::' in name else Config.fromfile(REPO / name)


def compare(task: str, size: str, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table: vHeat and Swin of one size."""
    scope, shape = TASKS[task], SHAPES[TASKS[task]]
    init_default_scope(scope)
    entries = published(task, size)
    models, costs, deployed = {}, {}, {}
    for entry in entries:
        name = entry['Metadata']['Architecture'][0]
        if name.startswith('vHeat'):
            deployed[name] = count(build(load(entry['Config']), deploy=shape), scope, shape)
        models[name] = build(load(entry['Config'])).eval()
        costs[name] = count(models[name], scope, shape)
    speeds = measure(models, scope, shape, args)
    return [
        row(name, entry['Metadata'], costs[name], deployed.get(name), speeds.get(name))
        for name, entry in zip(models, entries, strict=True)
    ]


def measure(models: dict, scope: str, shape: tuple[int, int], args: argparse.Namespace) -> dict[str, float]:
    """Images per second of each model, medians of rounds in turns."""
    if not args.repeats:
        return {}
    batch = args.batch_size if scope == 'mmpretrain' else 1

    def once(name: str) -> None:
        images, arguments = inputs[name]
        with torch.no_grad():
            models[name](images, **arguments)

    inputs = {name: make_input(model, scope, shape, batch) for name, model in models.items()}
    runs = {name: partial(timed, partial(once, name), 'cpu') for name in models}
    return {name: batch / result.median for name, result in take_turns(runs, args.repeats, 1).items()}


def row(name: str, stated: dict[str, Any], cost: Cost, deployed: Cost | None, speed: float | None) -> list[str]:
    """One row of the table."""
    millions, giga = (lambda n: f'{n / 1e6:.2f} M' if n else ''), (lambda n: f'{n / 1e9:.2f} G' if n else '')
    return [
        name, millions(cost.params), millions(stated.get('Parameters (published)', 0)),
        giga(cost.flops), giga(stated.get('FLOPs', 0)),
        millions(deployed.params if deployed else 0), giga(deployed.flops if deployed else 0),
        f'{speed:.3g}' if speed else '', str(stated.get('Images per Second (A100)', '')),
    ]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    """Rows as Markdown; columns that are empty throughout are left out."""
    kept = [i for i in range(len(HEADINGS)) if any(r[i] for r in rows)]
    lines = [HEADINGS, ['---', *['--:'] * (len(HEADINGS) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line[i] for i in kept) + ' |' for line in lines)


def fill(page: Path, tables: dict[str, str], machine: str) -> None:
    """Put the tables between the page's markers.

    Raises:
        ToolError: A marker is missing; nothing is written then.
    """
    text = page.read_text(encoding='utf-8')
    for name, content in {**tables, 'machine': machine}.items():
        pattern = re.compile(rf'(<!-- {name} -->\n).*?(<!-- end -->)', re.DOTALL)
        if not pattern.search(text):
            raise ToolError(f'{page} has no line "<!-- {name} -->" with an "<!-- end -->" after it')
        text = pattern.sub(lambda match, content=content: f'{match[1]}{content}\n{match[2]}', text)
    with atomic_file(page) as file:
        file.write(text.encode())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS))
    parser.add_argument('--sizes', nargs='+', choices=['t', 's', 'b'], default=['t', 's', 'b'])
    parser.add_argument('--batch-size', type=int, default=8, help='images at a time in classification (default 8)')
    parser.add_argument('--repeats', type=int, default=3, help='rounds of the measurement; 0 only counts (default 3)')
    parser.add_argument('--page', type=Path, help='write the tables into this page, between its markers')
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.repeats < 0:
        parser.error('--batch-size must be at least 1, --repeats at least 0')
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)

    def body() -> None:
        logging.disable(logging.WARNING)
        ensure_torchvision()
        if args.page and not args.page.is_file():
            raise ToolError(f'--page {args.page}: there is no such page to fill')
        tables = {}
        with tqdm([(t, s) for t in args.tasks for s in args.sizes], disable=not sys.stderr.isatty()) as bar:
            for task, size in bar:
                bar.set_description(f'{task} {size}')
                tables.setdefault(task, []).extend(compare(task, size, args))
        texts = {task: table(rows) for task, rows in tables.items()}
        for task, text in texts.items():
            height, width = SHAPES[TASKS[task]]
            print(f'{task}, {height} x {width}\n{text}\n')
        if args.page:
            options = ' '.join(sys.argv[1:] if argv is None else argv)
            machine = (
                f'{cpu_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, float32; '
                f'{datetime.date.today()}.\n\n```shell\npython .dev_scripts/compare_backbones.py {options}\n```'
            )
            fill(args.page, texts, machine)

    return run_reporting_errors(body)


if __name__ == '__main__':
    raise SystemExit(main())
