"""Make docs/gallery.md and its pictures from the demo's checkpoints: make demo demo-seg demo-cls gallery.

    python .dev_scripts/make_gallery.py [--demos demo_out] [--only cam worst]

Each picture is made by the command that the page shows below it; figures on the page are what that command printed.

The Swin of the receptive fields is untrained, unless ``tools/train.py configs/demo/mask-rcnn_swin-demo_coins.py
--work-dir demo_out/swin/train`` was run before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

REPO = Path(__file__).resolve().parents[1]
IMAGES = REPO / 'docs' / 'images' / 'gallery'
PAGE = REPO / 'docs' / 'gallery.md'
LARGEST, LARGEST_SUM = 250_000, 2_500_000  # bytes
HEAT = 'tools/visualization/heat.py'
CONFIGS = {
    'detection': 'configs/demo/mask-rcnn_vheat-demo_coins.py',
    'segmentation': 'configs/demo/vheat-demo_upernet_coins.py',
    'classification': 'configs/demo/vheat-demo_textures.py',
}
PHOTOS = {
    'detection': [f'coco/val/val_{number:05d}.jpg' for number in (2, 3, 10, 12)],
    'segmentation': [f'ade/images/validation/val_{number:05d}.jpg' for number in (2, 3, 10, 12)],
    'classification': [
        f'textures/val/{name}.jpg'
        for name in ('brick/val_00003', 'grass/val_00004', 'gravel/val_00005', 'brick/val_00006')
    ],
}


class GalleryError(Exception):
    """A message for the user, without a traceback."""


@dataclass
class Paths:
    """Where the demos are, and a folder for what the page does not show."""

    demos: Path
    scratch: Path

    def checkpoint(self, task: str) -> str:
        """That of a demo."""
        note = self.demos / task / 'train' / 'last_checkpoint'
        if not note.is_file():
            raise GalleryError(f'{note.parent} holds no training: make demo demo-seg demo-cls OUT={self.demos}')
        return note.read_text().strip()

    def data(self, name: str) -> str:
        return str(self.demos / 'data' / name)

    def swin(self) -> list[str]:
        """The checkpoint of a Swin trained as the demo's detector, if there is one."""
        note = self.demos / 'swin' / 'train' / 'last_checkpoint'
        return [note.read_text().strip()] if note.is_file() else []

    def run(self, *command: str) -> str:
        """Run a tool of the repository and return what it printed.

        Raises GalleryError with the last line where it fails.
        """
        environment = {**os.environ, 'VHEAT_DEMO_DATA': str(self.demos / 'data'), 'PYTHONWARNINGS': 'ignore'}
        done = subprocess.run(
            [sys.executable, *command], cwd=REPO, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise GalleryError(f'{shlex.join(command)}: {(done.stderr.strip() or done.stdout).splitlines()[-1]}')
        return done.stdout

    def shown(self, *command: str) -> str:
        """A command as the page shows it."""
        text = shlex.join(['python', *command])
        return text.replace(f'{self.demos}/', 'demo_out/').replace(f'{self.scratch}/', '')


@dataclass
class Entry:
    """A picture of the page.

    Attributes:
        title: Its heading.
        caption: What is to be seen.
        commands: What makes it, as the page shows them.
        figures: What the commands printed.
    """

    title: str
    caption: str
    commands: list[str]
    figures: str = ''


def heat(paths: Paths, target: Path, title: str, caption: str, *command: str) -> Entry:
    """A picture of tools/visualization/heat.py, with the lines that it prints."""
    printed = paths.run(HEAT, *command, '--out', str(target))
    figures = '\n'.join(line for line in printed.splitlines() if ' - mmengine - ' not in line)
    figures = figures.replace(f'{paths.demos}/', 'demo_out/')
    return Entry(title, caption, [paths.shown(HEAT, *command, '--out', target.name)], figures)


def side_by_side(pictures: list[Path], target: Path, width: int = 1280, gap: int = 8) -> None:
    """Put pictures in a row of a given width."""
    side = (width - gap * (len(pictures) - 1)) // len(pictures)
    row = Image.new('RGB', (width, side), 'white')
    for place, path in enumerate(pictures):
        with Image.open(path) as image:
            row.paste(image.convert('RGB').resize((side, side), Image.Resampling.LANCZOS), (place * (side + gap), 0))
    row.save(target)


# ---- the pictures, in the order of the page ----


def painted(paths: Paths, target: Path) -> Entry:
    """Predictions of the three tasks, as tools/predict.py paints them."""
    rows, commands = [], []
    for task in ('detection', 'segmentation', 'classification'):
        out = paths.scratch / task
        photos = [paths.data(photo) for photo in PHOTOS[task]]
        command = ['tools/predict.py', CONFIGS[task], paths.checkpoint(task), *photos, '--out', str(out)]
        paths.run(*command, '--save', 'painted')
        commands.append(paths.shown(*command[:3], 'IMAGE', '...', *command[-2:]))
        rows.append(target.with_name(f'{task}.part.png'))
        side_by_side([next((out / 'painted').rglob(Path(photo).name)) for photo in photos], rows[-1])
    images = [Image.open(row) for row in rows]
    sheet = Image.new('RGB', (images[0].width, sum(image.height + 8 for image in images) - 8), 'white')
    top = 0
    for image, row in zip(images, rows, strict=True):
        sheet.paste(image, (0, top))
        top += image.height + 8
        row.unlink()
    sheet.save(target)
    caption = 'Mask R-CNN, UPerNet and a classifier on vHeat, each trained from scratch in minutes on two CPU cores.'
    return Entry('Predictions of the three tasks', caption, commands)


def sliced(paths: Paths, target: Path) -> Entry:
    """A mosaic of 16 images, predicted whole and in tiles."""
    annotations = json.loads(Path(paths.data('coco/annotations/instances_val.json')).read_text())
    mosaic, truth, side = Image.new('RGB', (1024, 1024)), [], 256
    for place, image in enumerate(annotations['images'][:16]):
        left, top = place % 4 * side, place // 4 * side
        with Image.open(paths.data(f'coco/val/{image["file_name"]}')) as part:
            mosaic.paste(part, (left, top))
        boxes = [entry['bbox'] for entry in annotations['annotations'] if entry['image_id'] == image['id']]
        truth += [[x + left, y + top, width, height] for x, y, width, height in boxes]
    photo = paths.scratch / 'mosaic.png'
    mosaic.save(photo)
    commands, pictures, lines = [], [], []
    for name, options in (('whole', []), ('in tiles', ['--slice', '256', '--overlap', '0.25'])):
        out = paths.scratch / name.replace(' ', '_')
        command = ['tools/predict.py', CONFIGS['detection'], paths.checkpoint('detection'), str(photo), *options]
        paths.run(*command, '--out', str(out))
        commands.append(paths.shown(*command, '--out', str(out)))
        found = [entry['bbox'] for entry in json.loads((out / 'predictions.json').read_text())['annotations']]
        iou = np.asarray(coco_mask.iou(found, truth, [0] * len(truth))).reshape(len(found), len(truth))
        right = int((iou.max(0, initial=0) >= 0.5).sum())
        lines.append(f'{name}: {len(found)} detections, {right} of {len(truth)} coins found (IoU of the boxes >= 0.5)')
        pictures.append(next((out / 'painted').glob('*.png')))
    side_by_side(pictures, target)
    caption = (
        'Sixteen images as one of 1024 x 1024 pixels. Left: predicted whole, which the pipeline scales down to 256. '
        'Right: in tiles of 256 pixels that overlap by a quarter, each of which takes the way of a whole image.'
    )
    return Entry('Large images in tiles', caption, commands, '\n'.join(lines))


def worst_coins(paths: Paths, target: Path) -> Entry:
    caption = 'Annotation left, prediction right, the worst images first: misses, false coins and coins taken for one.'
    command = ['predictions', CONFIGS['detection'], paths.checkpoint('detection'), '--number', '4']
    return heat(paths, target, 'Where a detector fails', caption, *command)


def worst_textures(paths: Paths, target: Path) -> Entry:
    caption = 'The same for a segmentor: gravel is taken for grass, and what is around a coin for coin.'
    command = ['predictions', CONFIGS['segmentation'], paths.checkpoint('segmentation'), '--number', '4']
    return heat(paths, target, 'Where a segmentor fails', caption, *command)


def cam_classifier(paths: Paths, target: Path) -> Entry:
    caption = (
        'Grad-CAM of the class of the highest score, at the last stage and one and two stages earlier: the classifier '
        'looks at the background rather than at the coins, and there at bricks and blades.'
    )
    photos = [paths.data(photo) for photo in PHOTOS['classification'][:3]]
    layers = ['--layer', 'backbone', 'backbone.layers.2.1', 'backbone.layers.1.0']
    command = ['cam', CONFIGS['classification'], paths.checkpoint('classification'), *photos, *layers]
    return heat(paths, target, 'What a class is decided by', caption, *command)


def cam_detector(paths: Paths, target: Path) -> Entry:
    caption = 'Grad-CAM of all detected coins, and of the surest one alone: others that look like it light up, too.'
    photos = [paths.data(photo) for photo in PHOTOS['detection'][1:3]]
    command = ['cam', CONFIGS['detection'], paths.checkpoint('detection'), *photos, '--target', 'coin', '#1']
    return heat(paths, target, 'What a detection is decided by', caption, *command)


def cam_segmentor(paths: Paths, target: Path) -> Entry:
    caption = 'Grad-CAM of the coins and of the background that a segmentor predicts.'
    photo = paths.data(PHOTOS['segmentation'][1])
    command = ['cam', CONFIGS['segmentation'], paths.checkpoint('segmentation'), photo, '--target', 'coin', 'brick']
    return heat(paths, target, 'What a segmentation is decided by', caption, *command)


def erf(paths: Paths, target: Path) -> Entry:
    caption = (
        'Effective receptive field of the last map: mean over 50 images of the gradient of its centre, to the power of '
        '0.2. Training widens that of vHeat. Beside it: Swin of the same widths and depths, and networks of timm.'
    )
    images = ['--images', paths.data('coco/train'), '--number', '50']
    command = ['erf', CONFIGS['detection'], paths.checkpoint('detection'), '--before']
    of_timm = ([f'timm:{name}'] for name in ('swin_tiny_patch4_window7_224', 'convnext_atto', 'resnet18'))
    for other in (['configs/demo/mask-rcnn_swin-demo_coins.py', *paths.swin()], *of_timm):
        command += ['--beside', *other]
    return heat(paths, target, 'How far the network sees', caption, *command, *images)


def spread(paths: Paths, target: Path) -> Entry:
    caption = (
        'Heat from two patches of a photograph, through time under constant diffusivity, and as the diffusivity that '
        'each stage has learnt lets it flow in one block: little. The sums stay.'
    )
    command = [
        'spread',
        CONFIGS['detection'],
        paths.checkpoint('detection'),
        '--image',
        paths.data(PHOTOS['detection'][1]),
    ]
    return heat(paths, target, 'Heat conduction', caption, *command)


def spread_time(paths: Paths, target: Path) -> Entry:
    caption = 'The photograph itself through time, under constant diffusivity.'
    command = [
        'spread',
        CONFIGS['detection'],
        paths.checkpoint('detection'),
        '--image',
        paths.data(PHOTOS['detection'][1]),
    ]
    command += ['--size', '160', '--gif', str(target)]
    paths.run(HEAT, *command, '--out', str(target.with_suffix('.png')))
    return Entry('A photograph cools', caption, [paths.shown(HEAT, *command)])


def diffusivity(paths: Paths, target: Path) -> Entry:
    caption = (
        'Diffusivity k and decay of every frequency, as each block has learnt them in ten epochs: how fast heat flows '
        'differs between the stages, but over the frequencies k is still as random, and the picture says so.'
    )
    command = ['diffusivity', CONFIGS['detection'], paths.checkpoint('detection')]
    return heat(paths, target, 'Learnt diffusivity', caption, *command)


def embeddings(paths: Paths, target: Path) -> Entry:
    caption = 'Frequency value embeddings for 256 pixels, resized to 512 in each mode, and what it does to frequencies.'
    command = ['embeddings', CONFIGS['detection'], paths.checkpoint('detection'), '--to', '512']
    return heat(paths, target, 'Embeddings for larger images', caption, *command)


PICTURES: dict[str, Callable[[Paths, Path], Entry]] = {
    'painted': painted,
    'sliced': sliced,
    'worst_coins': worst_coins,
    'worst_textures': worst_textures,
    'cam_classifier': cam_classifier,
    'cam_detector': cam_detector,
    'cam_segmentor': cam_segmentor,
    'erf': erf,
    'spread': spread,
    'spread_time': spread_time,
    'diffusivity': diffusivity,
    'embeddings': embeddings,
}
ANIMATED = {'spread_time'}


# ---- the page ----

HEADER = """# Gallery

What a vHeat sees: the models of `make demo`, `make demo-seg` and `make demo-cls`. Each picture is made by the command
below it; `make gallery` makes all of them and this page. [heat.md](heat.md) explains the kinds of pictures.
"""


def compress(picture: Path) -> Path:
    """Make a picture small enough for the repository: PNG where that is, else the best JPEG; GIFs stay.

    Raises GalleryError where no quality is small enough.
    """
    if picture.suffix == '.png':
        with Image.open(picture) as image:
            pixels = image.convert('RGB')
        pixels.save(picture, optimize=True)
        if picture.stat().st_size > LARGEST:
            png, picture = picture, picture.with_suffix('.jpg')
            png.unlink()
            for quality in range(92, 49, -6):
                pixels.save(picture, quality=quality, optimize=True, progressive=True)
                if picture.stat().st_size <= LARGEST:
                    break
    if picture.stat().st_size > LARGEST:
        raise GalleryError(f'{picture.name} has {picture.stat().st_size} bytes, more than {LARGEST}')
    return picture


def section(entry: Entry, picture: Path) -> str:
    """A picture's part of the page."""
    lines = [f'## {entry.title}', '', entry.caption, '', f'![{entry.title}](images/gallery/{picture.name})', '']
    lines += ['```shell', *entry.commands, '```', '']
    if entry.figures:
        lines += ['```text', entry.figures, '```', '']
    return '\n'.join(lines)


def make_gallery(demos: Path, only: list[str] | None) -> None:
    """Make the pictures, or some of them, and the page."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    text = PAGE.read_text(encoding='utf-8') if PAGE.is_file() else ''
    parts = {re.findall(r'images/gallery/(\w+)', part)[0]: f'## {part}' for part in text.split('\n## ')[1:]}
    with tempfile.TemporaryDirectory() as scratch:
        paths = Paths(demos, Path(scratch))
        for name in only or PICTURES:
            target = Path(scratch, f'{name}.gif' if name in ANIMATED else f'{name}.png')
            entry = PICTURES[name](paths, target)
            picture = compress(target)
            for old in IMAGES.glob(f'{name}.*'):
                old.unlink()
            shutil.copy(picture, IMAGES)
            print(f'{picture.name}: {picture.stat().st_size / 1000:.0f} kB\n{entry.figures}', flush=True)
            parts[name] = section(entry, picture)
            kept = [parts[name] for name in PICTURES if name in parts]
            PAGE.write_text('\n'.join([HEADER, *kept]), encoding='utf-8')
    total = sum(picture.stat().st_size for picture in IMAGES.iterdir())
    print(f'{total / 1e6:.2f} MB in {IMAGES.relative_to(REPO)}')
    if total > LARGEST_SUM:
        raise GalleryError(f'all pictures have {total} bytes, more than {LARGEST_SUM}')


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description='Make docs/gallery.md from the checkpoints of the demos.')
    parser.add_argument('--demos', type=Path, default=Path('demo_out'), help='folder that the demos wrote (demo_out)')
    parser.add_argument('--only', nargs='+', choices=PICTURES, help='pictures to make; the others stay')
    args = parser.parse_args()
    try:
        make_gallery(args.demos.resolve(), args.only)
    except (GalleryError, OSError) as error:
        print(f'make_gallery: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
