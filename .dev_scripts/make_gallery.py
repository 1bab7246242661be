"""Make the pictures of docs/gallery.md from the demos' checkpoints: make demo demo-seg demo-cls gallery.

    python .dev_scripts/make_gallery.py [--demos demo_out] [--only cam_detector erf]

Runs the commands that the page shows below each picture, and writes what they print where the page shows it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / 'docs' / 'gallery.md'
IMAGES = REPO / 'docs' / 'images' / 'gallery'
WIDTH, LARGEST, LARGEST_SUM = 1280, 250_000, 2_500_000  # pixels, bytes, bytes
SWIN = 'configs/demo/mask-rcnn_swin-demo_coins.py'  # beside which the receptive field of vHeat is shown


class GalleryError(Exception):
    """A message for the user, without a traceback."""


def run(commands: str, folder: Path) -> str:
    """Run commands of a shell in a folder; returns what they print, without MMEngine's log.

    Raises GalleryError with the last line where one fails.
    """
    environment = {
        **os.environ,
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}',
        'VHEAT_DEMO_DATA': 'demo_out/data',
        'PYTHONWARNINGS': 'ignore',
    }
    done = subprocess.run(
        ['bash', '-ec', commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise GalleryError(f'{commands.strip()}: {(done.stderr.strip() or done.stdout).splitlines()[-1]}')
    said = (line for line in done.stdout.splitlines() if ' - mmengine - ' not in line)
    return '\n'.join(line for line in said if not line.startswith('written: '))


def compress(picture: Path) -> Path:
    """Write a picture for the page: PNG where that is small enough, else the best JPEG; GIFs as they are.

    Raises GalleryError where no quality is small enough.
    """
    target = IMAGES / picture.name
    for old in IMAGES.glob(f'{picture.stem}.*'):
        old.unlink()
    if picture.suffix == '.gif':
        target.write_bytes(picture.read_bytes())
    else:
        with Image.open(picture) as image:
            pixels = image.convert('RGB')
        pixels.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
        pixels.save(target, optimize=True)
        for quality in range(92, 49, -6):
            if target.stat().st_size <= LARGEST:
                break
            target.unlink()
            target = target.with_suffix('.jpg')
            pixels.save(target, quality=quality, optimize=True, progressive=True)
    if target.stat().st_size > LARGEST:
        raise GalleryError(f'{target.name} has {target.stat().st_size} bytes, more than {LARGEST}')
    return target


def make_section(section: str, name: str, folder: Path) -> str:
    """Make a section's picture, and return the section with the lines that its commands print."""
    printed = run(re.findall(r'```shell\n(.*?)```', section, re.DOTALL)[0], folder)
    picture = compress(
        next(folder / f'{name}{suffix}' for suffix in ('.gif', '.png') if (folder / f'{name}{suffix}').exists())
    )
    print(f'{picture.name}: {picture.stat().st_size / 1000:.0f} kB\n{printed}', flush=True)
    section = re.sub(r'(images/gallery/)[\w.]+', rf'\g<1>{picture.name}', section)
    return re.sub(r'(```text\n).*?(```)', lambda match: f'{match[1]}{printed}\n{match[2]}', section, flags=re.DOTALL)


def make_gallery(demos: Path, only: list[str]) -> None:
    """Make the pictures of the page, or some of them."""
    head, *sections = re.split(r'^(?=## )', PAGE.read_text(encoding='utf-8'), flags=re.MULTILINE)
    names = [re.findall(r'images/gallery/(\w+)', section)[0] for section in sections]
    if unknown := set(only) - set(names):
        raise GalleryError(f'--only {" ".join(sorted(unknown))}: the page has {", ".join(names)}')
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for link, target in (('demo_out', demos), *((name, REPO / name) for name in ('configs', 'tools'))):
            (folder / link).symlink_to(target)
        if not (demos / 'swin' / 'train' / 'last_checkpoint').is_file() and (not only or 'erf' in only):
            print('training a Swin as the detector of the demo, once: ten minutes', flush=True)
            run(f'python tools/train.py {SWIN} --work-dir demo_out/swin/train', folder)
        for place, name in enumerate(names):
            if not only or name in only:
                sections[place] = make_section(sections[place], name, folder)
                PAGE.write_text(''.join([head, *sections]), encoding='utf-8')
    total = sum(picture.stat().st_size for picture in IMAGES.iterdir())
    print(f'{total / 1e6:.2f} MB in {IMAGES.relative_to(REPO)}')
    if total > LARGEST_SUM:
        raise GalleryError(f'all pictures have {total} bytes, more than {LARGEST_SUM}')


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description='Make the pictures of docs/gallery.md from the checkpoints of the demos.'
    )
    parser.add_argument('--demos', type=Path, default=Path('demo_out'), help='folder that the demos wrote (demo_out)')
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help='pictures to make; the others stay')
    args = parser.parse_args()
    try:
        make_gallery(args.demos.resolve(), args.only)
    except (GalleryError, OSError) as error:
        print(f'make_gallery: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
