"""Test the published checkpoints and compare the results with the published ones.

    python tools/analysis_tools/reproduce.py [MODEL ...] [--nproc N] [--out FILE.md] [--work-dir DIR]
        [--cfg-options KEY=VALUE ...]

Each model runs in `tools/test.py CONFIG released` (with --nproc, in tools/dist_test.sh), in a process of its own. The
exit status is 0 if all results are within 0.2 points of the published ones, 1 if one is not or could not be
measured, 2 if the command line is wrong.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import load

try:
    import vheat_mm  # noqa: F401
except ModuleNotFoundError as error:  # not installed: take the package that this file lies with
    if error.name != 'vheat_mm':
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vheat_mm.apis.config import SCOPES
from vheat_mm.apis.doctor import distribution_version
from vheat_mm.checkpoint.released import find_released
from vheat_mm.engine.runner.environment import git_state
from vheat_mm.utils.config_place import did_you_mean
from vheat_mm.utils.errors import ToolError, describe
from vheat_mm.utils.files import atomic_file
from vheat_mm.version import __version__

ROOT = Path(__file__).resolve().parents[2]  # the repository, or vheat_mm/.mim of an installed package
TOLERANCE = 0.2  # points
# name in the metafiles -> name in the log, and what makes points of it
METRICS = {
    'Top 1 Accuracy': ('accuracy/top1', 1),
    'box AP': ('coco/bbox_mAP', 100),
    'mask AP': ('coco/segm_mAP', 100),
    'mIoU': ('mIoU', 1),
}


@dataclass
class Row:
    """One published result, and what became of it."""

    model: str
    metric: str
    published: float
    measured: float | None = None
    reason: str = ''  # why it was not measured

    @property
    def difference(self) -> float | None:
        """Points above the published result, to the hundredth."""
        return None if self.measured is None else round(self.measured - self.published, 2)

    @property
    def note(self) -> str:
        """Empty for a result that is reproduced."""
        if self.difference is None:
            return f'not measured: {self.reason}'
        return '' if abs(self.difference) <= TOLERANCE else f'**refused: more than {TOLERANCE} points**'

    def __str__(self) -> str:
        shown = (self.published, self.measured, self.difference)
        formats = ('{:g}', '{:.2f}', '{:+.2f}')
        numbers = ['' if value is None else text.format(value) for text, value in zip(formats, shown, strict=True)]
        return f'| {" | ".join([self.model, self.metric, *numbers, self.note.replace("|", "/")])} |'


def read_models(root: Path) -> dict[str, dict[str, Any]]:
    """Models with published weights in the metafiles of ``root / 'model-index.yml'``, by name."""
    files = [load(root / path) for path in load(root / 'model-index.yml')['Import']]
    return {model['Name']: model for file in files for model in file['Models'] if 'Weights' in model}


def published(model: dict[str, Any]) -> dict[str, float]:
    """A model's published results in points."""
    results = [result['Metrics'] for result in model['Results']]
    return {name: value for metrics in results for name, value in metrics.items() if name in METRICS}


def measure(model: dict[str, Any], args: argparse.Namespace, root: Path) -> tuple[dict[str, float], str]:
    """Test a model in processes of its own; returns all logged metrics, and the command.

    Raises:
        ToolError: It failed; the message is its error.
    """
    config, folder = root / model['Config'], args.work_dir / model['Name']
    script, processes = (['dist_run.py', 'test'], [str(args.nproc)]) if args.nproc > 1 else (['test.py'], [])
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / script[0]), *script[1:], str(config)]
    command += ['released', *processes, '--work-dir', str(folder)]
    command += ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    text = shlex.join(command)
    print(f'\n{text}', flush=True)
    before, reason = set(folder.glob('*/*.json')), ''
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors='replace') as process:
        for line in process.stderr:
            sys.stderr.write(line)
            reason = line.removeprefix('error: ').strip() if line.startswith('error: ') else reason
    if process.returncode:
        raise ToolError(reason or f'exit status {process.returncode}')
    logged = [load(path) for path in set(folder.glob('*/*.json')) - before]
    return {name: value for metrics in logged for name, value in metrics.items()}, text


def reproduce(model: dict[str, Any], args: argparse.Namespace, root: Path) -> tuple[list[Row], str]:
    """The rows of a model and the command that gave them; never raises."""
    metrics, command, reason = {}, '', 'the test did not log it'
    try:
        metrics, command = measure(model, args, root)
    except Exception as error:  # of any library: the other models go on
        reason = ' '.join(describe(error).split())
        print(f'error: {model["Name"]}: {reason}', file=sys.stderr)
    rows = []
    for metric, value in published(model).items():
        name, scale = METRICS[metric]
        measured = metrics[name] * scale if name in metrics else None
        rows.append(Row(model['Name'], metric, value, measured, reason))
    return rows, command


def report(rows: list[Row], commands: list[str], argv: list[str], nproc: int) -> str:
    """The table as Markdown, with versions and commands."""
    packages = ('torch', 'torchvision', 'mmengine', 'mmcv', *SCOPES.values())
    versions = ', '.join(f'{name} {distribution_version(name) or "not installed"}' for name in packages)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    own = f'vheat_mm {__version__} (commit {git_state(ROOT) or "unknown"})'
    lines = ['| model | metric | published | measured | difference | |', '|---|---|--:|--:|--:|---|', *map(str, rows)]
    lines += ['', f'{own}, {versions}; {nproc} x {device}.', '', '```shell']
    lines += [shlex.join(['python', 'tools/analysis_tools/reproduce.py', *argv]), *commands, '```']
    return '\n'.join(lines) + '\n'


def parse_args(argv: list[str], models: dict[str, dict[str, Any]]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='names (default: all)')
    parser.add_argument('--nproc', type=int, default=1, metavar='N', help='processes, one a GPU (default: 1)')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the table into this Markdown file')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/reproduce'), metavar='DIR', help='for logs')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='of all configs')
    args = parser.parse_args(argv)
    if args.nproc < 1:
        parser.error(f'--nproc {args.nproc}: expected a number of at least 1')
    if args.out and not args.out.parent.is_dir():
        parser.error(f'--out {args.out}: there is no folder {str(args.out.parent)!r}')
    args.models = [release.config if (release := find_released(name)) else name for name in args.models or models]
    if unknown := [name for name in args.models if name not in models]:
        names = [release.name if (release := find_released(name)) else name for name in models]
        hint = did_you_mean(unknown[0], [*names, *models])
        parser.error(f'no checkpoint of {unknown[0]!r} is published{hint}; there are those of {", ".join(names)}')
    return args


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; returns the exit status."""
    argv, models = sys.argv[1:] if argv is None else argv, read_models(root)
    args, rows, commands = parse_args(argv, models), [], []
    for name in args.models:
        found, command = reproduce(models[name], args, root)
        rows += found
        commands += [command] if command else []
        text = report(rows, commands, argv, args.nproc)
        if args.out:  # after each model: all of them take hours
            with atomic_file(args.out) as file:
                file.write(text.encode())
    print(f'\n{text}')
    return int(any(row.note for row in rows))


if __name__ == '__main__':
    raise SystemExit(main())
