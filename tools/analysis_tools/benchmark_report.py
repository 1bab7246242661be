"""Output of benchmark.py: table, JSON, CSV, picture and the page docs/performance.md."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_measure import fitted_exponent
from benchmark_models import WINDOW_RULES
from rich.console import Console
from rich.table import Table

from vheat_mm import __version__
from vheat_mm.ops import get_backend
from vheat_mm.utils.files import atomic_file

PACKAGES = ('torch', 'triton', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'numpy')
COLORS = {
    'vheat': 'tab:red', 'vheat-triton': 'tab:orange', 'vheat-reference': 'tab:pink',
    'swin': 'tab:blue', 'swin-scaled': 'tab:cyan', 'convnext': 'tab:green',
}  # fmt: skip
PRESET_OF = dict(cpu='cpu', cuda='h200')
Run = dict[str, Any]


def describe_run(args: argparse.Namespace, command: str) -> Run:
    """Versions, machine and settings of a run; ``cases`` is filled while measuring."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return dict(
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        commit=_commit(),
        device=torch.cuda.get_device_name() if args.device == 'cuda' else cpu_name(),
        kind=args.device,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        versions=versions | dict(vheat_mm=__version__, cuda=torch.version.cuda, python=platform.python_version()),
        tf32=args.tf32,
        memory_layout='images (B, C, H, W) contiguous; inside, each model its own',
        compile=args.compile,
        kernels=get_backend(),
        arch=args.arch,
        window_rules={name: rule for name, rule in WINDOW_RULES.items() if name in args.models},
        rounds=dict(repeats=args.repeats, warmup=args.warmup, min_time=args.min_time),
        cases=[],
    )


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        text = ''
    found = re.search(r'model name\s*: (.+)', text)
    return found.group(1) if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    git = shutil.which('git')
    if git is None:
        return None
    done = subprocess.run(
        [git, 'describe', '--always', '--dirty'], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def rows(run: Run) -> Iterator[dict[str, Any]]:
    """One flat record per case and model, ratios of times included."""
    best = _best_limits(run)
    for case in run['cases']:
        seconds = {name: record.get('seconds') for name, record in case['models'].items()}
        for name, record in case['models'].items():
            row = dict(
                mode=case['mode'], dtype=case['dtype'], height=case['size'][0], width=case['size'][1],
                batch_size=case['batch_size'], model=name, seconds=seconds[name],
                images_per_s=record.get('images_per_s'), peak_bytes=record.get('peak_bytes'),
                saved_bytes=record.get('saved_bytes'), error=record.get('error'),
            )  # fmt: skip
            for other in ('swin', 'convnext', 'vheat-reference'):
                both = seconds[name] and seconds.get(other)
                row[f'over_{other}'] = seconds[name] / seconds[other] if both else None
            roofline = record.get('roofline')
            row['flops'] = roofline['flops'] / case['batch_size'] if roofline else None
            row['of_roofline'] = _fraction(roofline, best[case['dtype']], seconds[name]) if roofline else None
            yield row


def _best_limits(run: Run) -> dict[str, dict[str, float]]:
    """Highest rates per type over all cases: other processes may have slowed the machine down in some."""
    best: dict[str, dict[str, float]] = {}
    for case in run['cases']:
        of_type = best.setdefault(case['dtype'], dict(flop_per_s=0.0, bytes_per_s=0.0))
        for record in case['models'].values():
            for name in of_type if record.get('roofline') else ():
                of_type[name] = max(of_type[name], record['roofline'][name])
    return best


def _fraction(roofline: dict[str, float], limits: dict[str, float], seconds: float) -> float:
    work = roofline['flops'] / limits['flop_per_s'], roofline['minimal_bytes'] / limits['bytes_per_s']
    return max(work) / seconds


def exponents(run: Run) -> dict[tuple[str, str, str], float]:
    """Exponent of the time per image in the number of pixels, by (mode, dtype, model), fitted to square sizes."""
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows(run):
        if row['seconds'] and row['height'] == row['width']:
            key = (row['mode'], row['dtype'], row['model'])
            points.setdefault(key, []).append((row['height'] * row['width'], row['seconds'] / row['batch_size']))
    fits = {key: fitted_exponent(*zip(*values, strict=True)) for key, values in points.items()}
    return {key: value for key, value in fits.items() if value is not None}


HEADINGS = (
    'case', 'model', 'ms', 'img/s', 'peak MB', 'saved MB',
    'over swin', 'over convnext', 'over reference', 'GFLOP/img', 'of roofline',
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of HEADINGS."""

    def number(key: str, scale: float, digits: int) -> str:
        return '' if row[key] is None else f'{row[key] * scale:.{digits}f}'

    case = f'{row["mode"]} {row["dtype"]} {row["batch_size"]} x {row["height"]}x{row["width"]}'
    milliseconds = number('seconds', 1e3, 1) or (row['error'] or '')[:40]
    return [
        case, row['model'], milliseconds, number('images_per_s', 1, 1), number('peak_bytes', 1e-6, 0),
        number('saved_bytes', 1e-6, 0), number('over_swin', 1, 2), number('over_convnext', 1, 2),
        number('over_vheat-reference', 1, 2), number('flops', 1e-9, 2), number('of_roofline', 1, 2),
    ]  # fmt: skip


def print_table(run: Run) -> None:
    """Print all cases, and the fitted exponents below."""
    table = Table(
        title=f'{run["device"]}, {run["threads"]} threads, compile {run["compile"]}, kernels {run["kernels"]}'
    )
    for heading in HEADINGS:
        table.add_column(heading, justify='left' if heading in HEADINGS[:2] else 'right')
    before = None
    for row in rows(run):
        texts = cells(row)
        if before not in (None, texts[0]):
            table.add_section()
        before = texts[0]
        table.add_row(*texts)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    for (mode, dtype, model), value in exponents(run).items():
        console.print(f'{mode} {dtype} {model}: time per image grows as pixels^{value:.3f}')


def write_results(folder: Path, run: Run) -> None:
    """Write benchmark.json, benchmark.csv and benchmark.png, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / 'benchmark.json') as file:
        file.write(json.dumps(run, indent=1).encode())
    flat = list(rows(run))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    with atomic_file(folder / 'benchmark.csv') as file:
        file.write(text.getvalue().encode())
    with atomic_file(folder / 'benchmark.png') as file:
        draw(run, file)


def draw(run: Run, target: Any) -> None:
    """Time per image against pixels, a panel per mode and type, one line per model, with fitted exponents."""
    import matplotlib as mpl

    mpl.use('Agg')
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((case['mode'], case['dtype']) for case in run['cases']))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False)
    fits = exponents(run)
    for axis, (mode, dtype) in zip(axes[0], panels, strict=True):
        found = [row for row in rows(run) if (row['mode'], row['dtype']) == (mode, dtype) and row['seconds']]
        for model in dict.fromkeys(row['model'] for row in found):
            points = sorted(
                (r['height'] * r['width'], r['seconds'] / r['batch_size'] * 1e3, r['height'] == r['width'])
                for r in found
                if r['model'] == model
            )
            fit = fits.get((mode, dtype, model))
            label = model if fit is None else f'{model}: pixels$^{{{fit:.2f}}}$'
            line = [p for p in points if p[2]]
            style = dict(color=COLORS[model], linestyle='--' if model == 'vheat-reference' else '-')
            axis.plot([p[0] for p in line], [p[1] for p in line], marker='o', markersize=4, label=label, **style)
            others = [p for p in points if not p[2]]
            axis.plot([p[0] for p in others], [p[1] for p in others], marker='x', linestyle='', color=COLORS[model])
        axis.set(xscale='log', yscale='log', xlabel='pixels', ylabel='ms per image', title=f'{mode}, {dtype}')
        axis.grid(alpha=0.3, which='both')
        axis.legend(fontsize=8)
    compiled = '' if run['compile'] == 'none' else f', compiled ({run["compile"]})'
    figure.suptitle(f'{run["arch"]} backbones, {run["device"]}, {run["threads"]} CPU threads{compiled}', fontsize=10)
    figure.tight_layout()
    figure.savefig(target, format='png', dpi=110)
    plt.close(figure)


def write_page(page: str, results: list[str]) -> None:
    """Write the page of figures from result files; a picture beside a result is copied beside the page.

    Raises:
        SystemExit: A result file is missing, or was not written by this tool.
    """
    target = Path(page)
    runs = [(Path(path), _read(path)) for path in results]
    names = ' '.join(path.parent.name + '/' + path.name for path, _ in runs)
    parts = [
        f'<!-- Written by `tools/analysis_tools/benchmark.py --page` from {names}; edit that, not this. -->',
        '# Speed and memory',
        'Every figure is the median over rounds in which the models take turns within one process: compare within a '
        'table, not between tables. Each table has its commit below it.',
        '- `vheat-reference`: the same weights with the backend `reference` (`VHEAT_KERNELS=reference`).\n'
        "- over swin: the time divided by that of mmdet's Swin (window 7) in the same rounds.\n"
        "- peak MB: on CUDA the device's peak memory, on the CPU the growth of the process. saved MB: what autograd "
        'keeps for backward.\n'
        '- GFLOP/img: products and convolutions per image, two FLOPs per multiply-add. The CPU kernels need fewer, as '
        'they split the DCT of large maps into even and odd parts.\n'
        '- of roofline: the least time that this work can take, divided by the time taken. The least time is that of '
        'the FLOPs at the rate of a large matrix product, or of the memory traffic at the rate of a copy, if longer; '
        'both rates are the best measured in the same run.',
    ]
    for kind, title in (('cpu', 'On a CPU'), ('cuda', 'On a GPU')):
        parts.append(f'## {title}')
        chosen = [(path, run) for path, run in runs if run['kind'] == kind]
        if not chosen:
            command = (
                f'python tools/analysis_tools/benchmark.py --preset {PRESET_OF[kind]} --out-dir work_dirs/benchmark'
            )
            parts.append(f'Nothing has been measured yet. One call does it:\n\n```shell\n{command}\n```')
        for path, run in chosen:
            parts += _section(path, run, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as file:
        file.write(('\n\n'.join(parts) + '\n').encode())


def _section(path: Path, run: Run, page: Path) -> Iterator[str]:
    compiled = 'eager' if run['compile'] == 'none' else f'compiled ({run["compile"]})'
    modes = ' and '.join(dict.fromkeys(case['mode'] for case in run['cases']))
    yield f'### {run["arch"]}, {modes}, {compiled}'
    picture = path.with_name('benchmark.png')
    if picture.is_file():
        copy = page.parent / 'images' / f'benchmark_{path.parent.name}.png'
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, copy)
        yield f'![time against resolution](images/{copy.name})'
    lines = ['| ' + ' | '.join(HEADINGS) + ' |', '|---|---' + '|--:' * (len(HEADINGS) - 2) + '|']
    before = ''
    for row in rows(run):
        texts = cells(row)
        texts[0], before = ('' if texts[0] == before else texts[0]), texts[0]
        lines.append('| ' + ' | '.join(texts) + ' |')
    yield '\n'.join(lines)
    fits = exponents(run)
    if fits:
        yield 'Exponent of the time per image in the number of pixels, square sizes: ' + '; '.join(
            f'{mode} {dtype} {model} {value:.3f}' for (mode, dtype, model), value in fits.items()
        )
    versions = ', '.join(f'{name} {version}' for name, version in run['versions'].items() if version)
    rules = '; '.join(f'{name}: {rule}' for name, rule in run['window_rules'].items())
    yield (
        f'{run["device"]}, {run["cores"]} cores, {run["threads"]} threads; {versions}; commit {run["commit"]}, '
        f'{run["date"][:10]}; kernels `{run["kernels"]}`; TF32 {"on" if run["tf32"] else "off"}'
        + (f'; {rules}' if rules else '')
        + f'.\n\n```shell\n{run["command"]}\n```'
    )


def _read(path: str) -> Run:
    try:
        run = json.loads(Path(path).read_text(encoding='utf-8'))
        run['cases'], run['kind'], run['command']
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f'error: {path} is no benchmark.json of this tool ({error!r}): give what --out-dir received'
        raise SystemExit(message) from error
    return run
