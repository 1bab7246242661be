"""``tools/visualization/heat.py``: pictures of what a network has learnt."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.apis.heat import cam, comparison, diffusivity, embeddings, erf, spread
from vheat_mm.apis.heat.figures import check_out
from vheat_mm.engine import fileio
from vheat_mm.utils.errors import ToolError

# Each has add_arguments(parser) and run(args), which writes args.out; its docstring's first line is the help.
KINDS: dict[str, Any] = dict(
    cam=cam, predictions=comparison, erf=erf, spread=spread, diffusivity=diffusivity, embeddings=embeddings
)


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


def draw(args: argparse.Namespace) -> None:
    """Draw a kind; what is missing is told before any work.

    Raises:
        ToolError: ``--out`` is no PNG file; a library is not installed.
    """
    check_out(args.out)
    try:
        import matplotlib.figure  # noqa: F401

        KINDS[args.kind].run(args)
        print(f'written: {args.out}')
    except ModuleNotFoundError as error:
        library = (error.name or '').partition('.')[0]
        if library not in ('matplotlib', 'pycocotools', 'scipy'):
            raise
        raise ToolError(f"heat.py {args.kind} needs {library}: pip install 'vheat_mm[demo]'") from error


def run_heat(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status: 0, or 2 after an error message on stderr."""
    args = make_parser().parse_args(argv)
    fileio.install()
    return run_reporting_errors(functools.partial(draw, args))
