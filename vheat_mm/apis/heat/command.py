"""``tools/visualization/heat.py``: pictures of what a network has learnt."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.apis.heat import cam, comparison, diffusivity, embeddings, erf, spread
from vheat_mm.engine import fileio

# Each has add_arguments(parser) and run(args), which writes args.out; its docstring's first line is the help.
KINDS = {
    'cam': cam,
    'predictions': comparison,
    'erf': erf,
    'spread': spread,
    'diffusivity': diffusivity,
    'embeddings': embeddings,
}


def make_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/visualization/heat.py``."""
    parser = argparse.ArgumentParser(description='Draw what a network has learnt.')
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND')
    for name, module in KINDS.items():
        text = (module.__doc__ or '').splitlines()[0]
        kind = kinds.add_parser(name, help=text, description=text)
        module.add_arguments(kind)
        kind.add_argument('--out', default=f'{name}.png', help=f'picture to write ({name}.png)')
    return parser


def run_heat(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status: 0, or 2 after an error message on stderr."""
    args = make_parser().parse_args(argv)
    fileio.install()
    return run_reporting_errors(functools.partial(KINDS[args.kind].run, args))
