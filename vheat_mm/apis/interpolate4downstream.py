"""Resize the frequency value embeddings (FVEs) of a vHeat checkpoint for another image size.

interpolate4downstream --pt_pth vHeat_tiny.pth --pt_size 224 --tg_pth vheat_tiny_512.pth --tg_size 512
"""

import argparse
import sys
from pathlib import Path

from vheat_mm.models.resize_weights import check_target, resize_checkpoint, write_resized
from vheat_mm.ops.freq_embed import RESIZE_MODES, to_pair
from vheat_mm.utils.errors import CheckpointError


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        '--pt_pth',
        required=True,
        help='checkpoint to read: classification, MMEngine, bare, safetensors; or a name such as vheat_tiny',
    )
    parser.add_argument(
        '--pt_size', type=int, nargs='+', default=[224], metavar='PIXELS', help='image size it was trained with, or H W'
    )
    parser.add_argument('--tg_pth', required=True, help='file to write; never the input')
    parser.add_argument('--tg_size', type=int, nargs='+', default=[512], metavar='PIXELS', help='image size, or H W')
    parser.add_argument(
        '--mode',
        choices=RESIZE_MODES,
        default='pad',
        help='pad: entry n stays entry n (n half waves across the map), new entries are 0, as in the release; '
        'bicubic, bilinear: an entry keeps its frequency per pixel',
    )
    parser.add_argument('--ema', action='store_true', help='take the moving average of the weights')
    parser.add_argument('--prefix', help="prefix of the backbone's keys, where a file holds several backbones")
    parser.add_argument('--dry-run', action='store_true', help='show what would be done and write nothing')
    args = parser.parse_args(argv)
    for name in ('pt_size', 'tg_size'):
        values = getattr(args, name)
        if len(values) > 2:
            parser.error(f'--{name} takes one or two numbers, got {values}')
        setattr(args, name, (values[0], values[-1]))
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    try:
        source, target = to_pair(args.pt_size, '--pt_size'), to_pair(args.tg_size, '--tg_size')
        resized = resize_checkpoint(args.pt_pth, source, target, args.mode, args.ema, args.prefix)
        check_target(resized, args.tg_pth)
        if not args.dry_run:
            write_resized(resized, args.tg_pth)
    except (CheckpointError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(resized.table())
    if args.dry_run:
        print(f'nothing written (--dry-run), mode {args.mode}')
    else:
        size = Path(args.tg_pth).expanduser().stat().st_size
        print(f'written to {args.tg_pth!r}, mode {args.mode}, {size / 1e6:.1f} MB')
    return 0
