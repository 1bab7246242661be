"""Check every image and annotation of a config's data sets before training.

    python tools/misc/check_dataset.py CONFIG [--split train val test] [--workers N] [--out report.json]

Lists what would stop training or make it learn wrong things (errors), and what it can handle but is worth knowing
(warnings). The exit status is 0 without errors, 1 with errors, 2 if the check could not run. docs/data_checks.md
lists all kinds of findings.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

try:
    import vheat_mm  # noqa: F401
except ModuleNotFoundError as error:  # not installed: use the package of this repository
    if error.name != 'vheat_mm':
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vheat_mm.apis.config import add_config_arguments, read_config
from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.datasets.checks.check import check_datasets
from vheat_mm.datasets.checks.datasets import SPLITS
from vheat_mm.engine import fileio
from vheat_mm.engine.runner.distributed import available_cores
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import atomic_file


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_config_arguments(parser)
    parser.add_argument('--split', nargs='+', choices=SPLITS, default=SPLITS, help='data loaders (default: all three)')
    parser.add_argument('--workers', type=int, metavar='N', help='processes that decode (default: one for each core)')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write all findings into this JSON file')
    parser.add_argument('--limit', type=int, metavar='N', help='open the files of the first N samples of each data set')
    parser.add_argument(
        '--show', type=int, default=20, metavar='N', help='findings of a kind that are printed (default: 20; 0: all)'
    )
    parser.add_argument('--strict', action='store_true', help='exit with 1 on warnings, too')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)  # read_config expects those of tools/train.py
    args = parser.parse_args(argv)
    for name, least in (('workers', 1), ('limit', 1), ('show', 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name} {value}: expected a number of at least {least}')
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    failed = False

    def body() -> None:
        nonlocal failed
        if args.out and (not args.out.parent.is_dir() or args.out.is_dir()):
            raise ToolError(f'--out {args.out}: expected the name of a file in a folder that exists')
        logging.disable(logging.WARNING)
        fileio.install()  # reads files as training does
        cfg = read_config(args)
        report = check_datasets(cfg, args.split, args.workers or available_cores(), args.limit)
        print(report.render(args.show))
        if args.out:
            with atomic_file(args.out) as file:
                file.write(json.dumps(dict(config=args.config, **report.to_dict()), indent=1).encode())
            print(f'all findings: {args.out}')
        failed = report.failed(args.strict)

    return run_reporting_errors(body) or int(failed)


if __name__ == '__main__':
    raise SystemExit(main())
