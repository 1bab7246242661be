"""Make a small data set with exact instance and semantic masks out of real photographs.

scikit-image carries a photograph of 24 Greek coins and close-ups of brick, grass and gravel. The
coins are segmented, cut out, turned, flipped, scaled, relit, and laid over each other on crops of
the textures; half of the images show two textures side by side. As the coins are placed by
the program, every mask is exact, also where coins overlap.

Train and val share no pixel: val has its own six coins and its own half of each texture.

    python demo/make_demo_data.py --out data/coins

    data/coins/coco/      annotations/instances_{train,val}.json  train/  val/
    data/coins/ade/       annotations/{training,validation}/  images/{training,validation}/
    data/coins/textures/  {train,val}/{brick,grass,gravel}/

In the ADE20K layout 0 means unlabelled (the blended seam between two textures), 1 brick, 2 grass,
3 gravel, 4 coin: what `reduce_zero_label=True` expects. Images of these two layouts are the same files.
For classification there are as many others, of coins on one texture: its name is the class, and the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as mask_api
from scipy import ndimage
from skimage import data, filters, measure, segmentation, transform

FloatImage = npt.NDArray[np.float32]  # (H, W), grey, 0 to 1
Mask = npt.NDArray[np.bool_]  # (H, W)

TEXTURES = ('brick', 'grass', 'gravel')
COIN_LABEL = len(TEXTURES) + 1
NUM_COINS = 24
SPLITS = {'train': 'training', 'val': 'validation'}  # COCO's name and ADE20K's
MANIFEST = 'demo_data.json'  # marks a folder as made by this tool; holds its settings
# Factors on the photographs' brightness. The ranges overlap: some coins are brighter than the background, some are not.
TEXTURE_LIGHT, COIN_LIGHT = (0.6, 1.1), (0.85, 1.35)
MIN_VISIBLE = 0.4  # of a coin's area; a placement that hides more of any coin is not made


class DemoDataError(Exception):
    """A message for the user, without a traceback."""


@dataclass(frozen=True)
class Coin:
    """One coin cut out with a small margin; ``pixels`` and ``mask`` are (h, w)."""

    pixels: FloatImage
    mask: Mask


@dataclass(frozen=True)
class Scene:
    """One composite: ``image`` (S, S) in 0..1, ``labels`` (S, S) in 0..4, the visible ``masks``."""

    image: FloatImage
    labels: npt.NDArray[np.uint8]
    masks: list[Mask]


def segment_coins(margin: int = 3) -> list[Coin]:
    """Cut the coins out of scikit-image's photograph, in reading order.

    Watershed on the edge strength, from what is surely background and surely metal.
    """
    photo = data.coins()
    seeds = np.zeros(photo.shape, dtype=np.int32)
    seeds[photo < 30] = 1
    seeds[photo > 150] = 2
    metal = segmentation.watershed(filters.sobel(photo), seeds) == 2
    metal = ndimage.binary_opening(ndimage.binary_fill_holes(metal), iterations=2)
    labels = measure.label(metal)
    regions = [r for r in measure.regionprops(labels) if r.area > 500]
    if len(regions) != NUM_COINS:
        raise DemoDataError(
            f'found {len(regions)} coins in the photograph of scikit-image, expected {NUM_COINS}: '
            'install the version of requirements/pinned.txt'
        )
    row_height = photo.shape[0] / 4
    regions.sort(key=lambda r: (int(r.centroid[0] // row_height), r.centroid[1]))
    coins = []
    for region in regions:
        top, left, bottom, right = region.bbox
        rows = slice(max(top - margin, 0), bottom + margin)
        columns = slice(max(left - margin, 0), right + margin)
        pixels = photo[rows, columns].astype(np.float32) / 255
        coins.append(Coin(pixels, labels[rows, columns] == region.label))
    return coins


def coins_of(split: str, coins: list[Coin]) -> list[Coin]:
    """Every fourth coin is kept for val: six, of all sizes."""
    return [coin for i, coin in enumerate(coins) if (i % 4 == 3) == (split == 'val')]


def textures_of(split: str) -> list[FloatImage]:
    """The left half of each 512 x 512 texture is for train, the right half for val."""
    halves = []
    for name in TEXTURES:
        whole = getattr(data, name)().astype(np.float32) / 255
        middle = whole.shape[1] // 2
        halves.append(whole[:, :middle] if split == 'train' else whole[:, middle:])
    return halves


def texture_crop(texture: FloatImage, size: int, rng: np.random.Generator) -> FloatImage:
    """A random square of the texture, flipped and rotated by multiples of 90 degrees, (size, size)."""
    side = int(rng.integers(round(0.65 * texture.shape[1]), texture.shape[1] + 1))
    top = int(rng.integers(texture.shape[0] - side + 1))
    left = int(rng.integers(texture.shape[1] - side + 1))
    crop = np.rot90(texture[top : top + side, left : left + side], int(rng.integers(4)))
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    shrinks = side > size
    crop = transform.resize(crop, (size, size), order=1, anti_aliasing=shrinks)
    return relit(crop, TEXTURE_LIGHT, rng)


def relit(pixels: FloatImage, brightness: tuple[float, float], rng: np.random.Generator) -> FloatImage:
    """Contrast within a quarter and brightness within a range of factors, clipped to 0..1."""
    mean = pixels.mean()
    contrast, light = rng.uniform(0.75, 1.25), rng.uniform(*brightness)
    return np.clip((mean + (pixels - mean) * contrast) * light, 0, 1).astype(np.float32)


def background(
    textures: list[FloatImage], size: int, rng: np.random.Generator
) -> tuple[FloatImage, npt.NDArray[np.uint8]]:
    """One texture, or two (if given) along a wavy border whose blended pixels stay unlabelled (0)."""
    first, second = rng.choice(len(textures), 2, replace=len(textures) < 2)
    image = texture_crop(textures[first], size, rng)
    labels = np.full((size, size), first + 1, dtype=np.uint8)
    if first == second or rng.random() < 0.5:
        return image, labels
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = rng.uniform(0.02, 0.08) * np.sin(rng.uniform(4, 12) * along + rng.uniform(0, 6.3))
    distance = (across - wave - rng.uniform(-0.2, 0.2)) * size  # pixels to the border
    weight = np.clip(0.5 + distance / 4, 0, 1).astype(np.float32)
    image = image * (1 - weight) + texture_crop(textures[second], size, rng) * weight
    labels[weight == 1] = second + 1
    labels[(weight > 0) & (weight < 1)] = 0
    return image, labels


def turned(coin: Coin, scale: float, rng: np.random.Generator) -> tuple[FloatImage, FloatImage]:
    """The coin at a random angle, perhaps flipped: pixels and coverage (0..1), both (n, n)."""
    height, width = coin.mask.shape
    side = int(np.ceil(np.hypot(height, width) * scale)) + 2
    flip = -1.0 if rng.random() < 0.5 else 1.0
    centre = (
        transform.AffineTransform(translation=(-(width - 1) / 2, -(height - 1) / 2))
        + transform.AffineTransform(scale=(scale * flip, scale))
        + transform.AffineTransform(rotation=rng.uniform(0, 2 * np.pi))
        + transform.AffineTransform(translation=((side - 1) / 2, (side - 1) / 2))
    )
    back, shape = centre.inverse, (side, side)
    pixels = transform.warp(relit(coin.pixels, COIN_LIGHT, rng), back, output_shape=shape, order=1, mode='edge')
    cover = transform.warp(coin.mask.astype(np.float32), back, output_shape=shape, order=1)
    return pixels.astype(np.float32), cover.astype(np.float32)


def compose(coins: list[Coin], textures: list[FloatImage], size: int, rng: np.random.Generator) -> Scene:
    """Lay three to nine coins on a background; later ones lie on top of earlier ones."""
    image, labels = background(textures, size, rng)
    masks: list[Mask] = []
    whole: list[int] = []  # area of each coin before anything covers it, image border included
    wanted = int(rng.integers(3, 10))
    for _ in range(4 * wanted):
        if len(masks) == wanted:
            break
        coin = coins[int(rng.integers(len(coins)))]
        # Coins measure 37 to 64 pixels across in the photograph.
        pixels, cover = turned(coin, rng.uniform(0.7, 1.4) * size / 256, rng)
        centre = rng.uniform(0.05, 0.95, 2) * size
        top, left = np.round(centre - cover.shape[0] / 2).astype(int)
        here = (
            slice(max(top, 0), min(top + cover.shape[0], size)),
            slice(max(left, 0), min(left + cover.shape[1], size)),
        )
        there = tuple(slice(s.start - o, s.stop - o) for s, o in zip(here, (top, left), strict=True))
        mask = np.zeros((size, size), dtype=np.bool_)
        mask[here] = cover[there] > 0.5
        left_over = [old & ~mask for old in masks] + [mask]
        areas = [*whole, int((cover > 0.5).sum())]
        if any(m.sum() < MIN_VISIBLE * a for m, a in zip(left_over, areas, strict=True)):
            continue
        masks, whole = left_over, areas
        image[here] += cover[there] * (pixels[there] - image[here])
        labels[mask] = COIN_LABEL
    return Scene(image, labels, masks)


def coco_annotation(mask: Mask, index: int, image_id: int) -> dict:
    """One COCO annotation, its mask run-length encoded: exact, also where a coin is in pieces."""
    rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(
        id=index,
        image_id=image_id,
        category_id=1,
        iscrowd=0,
        bbox=[float(v) for v in mask_api.toBbox(rle)],
        area=int(mask.sum()),
        segmentation=dict(size=list(mask.shape), counts=rle['counts'].decode('ascii')),
    )


def write_split(root: Path, split: str, num: int, size: int, seed: int, coins: list[Coin]) -> None:
    """Write ``num`` images of one split with both kinds of annotation below ``root``."""
    coco_images = root / 'coco' / split
    ade_images = root / 'ade' / 'images' / SPLITS[split]
    ade_labels = root / 'ade' / 'annotations' / SPLITS[split]
    for folder in (coco_images, ade_images, ade_labels, root / 'coco' / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
    coins, textures = coins_of(split, coins), textures_of(split)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id in range(1, num + 1):
        # One generator per image: asking for more images leaves the earlier ones as they were.
        rng = np.random.default_rng([seed, list(SPLITS).index(split), image_id])
        scene = compose(coins, textures, size, rng)
        name = f'{split}_{image_id:05d}'
        save_jpeg(scene, coco_images / f'{name}.jpg')
        link_or_copy(coco_images / f'{name}.jpg', ade_images / f'{name}.jpg')
        Image.fromarray(scene.labels).save(ade_labels / f'{name}.png')
        images.append(dict(id=image_id, file_name=f'{name}.jpg', height=size, width=size))
        for mask in scene.masks:
            annotations.append(coco_annotation(mask, len(annotations) + 1, image_id))
    content = dict(
        info=dict(description='coins on textures, composed from the photographs of scikit-image'),
        categories=[dict(id=1, name='coin', supercategory='object')],
        images=images,
        annotations=annotations,
    )
    (root / 'coco' / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def write_classes(root: Path, split: str, num: int, size: int, seed: int, coins: list[Coin]) -> None:
    """Write ``num`` images of one split, each in the folder of its only texture, below ``root``."""
    coins = coins_of(split, coins)
    textures = dict(zip(TEXTURES, textures_of(split), strict=True))
    for image_id in range(1, num + 1):
        name = TEXTURES[image_id % len(TEXTURES)]
        rng = np.random.default_rng([seed, list(SPLITS).index(split), image_id, 1])
        folder = root / 'textures' / split / name
        folder.mkdir(parents=True, exist_ok=True)
        save_jpeg(compose(coins, [textures[name]], size, rng), folder / f'{split}_{image_id:05d}.jpg')


def save_jpeg(scene: Scene, path: Path) -> None:
    grey = np.round(scene.image * 255).astype(np.uint8)
    Image.fromarray(grey).convert('RGB').save(path, quality=95)


def link_or_copy(source: Path, target: Path) -> None:
    """Share the file between two names; copy where the file system knows no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def make_demo_data(out: Path, num_train: int = 200, num_val: int = 40, size: int = 256, seed: int = 0) -> bool:
    """Write the data set to ``out``, atomically: all of it, or nothing after an error.

    Returns False where ``out`` already holds exactly what was asked for. A data set of this tool
    with other settings is replaced; any other folder is refused.
    """
    if min(num_train, num_val) < 1:
        raise DemoDataError(f'--num-train {num_train} --num-val {num_val}: each split needs an image')
    if size < 64:
        raise DemoDataError(f'--size {size}: a coin needs images of at least 64 pixels')
    if seed < 0:
        raise DemoDataError(f'--seed {seed}: a seed is 0 or more')
    settings = dict(version=2, num_train=num_train, num_val=num_val, size=size, seed=seed)
    out = out.resolve()
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
            raise DemoDataError(f'--out {out}: not made by this tool, so not replaced; choose another')
        if (out / MANIFEST).is_file() and json.loads((out / MANIFEST).read_text()) == settings:
            return False
    out.parent.mkdir(parents=True, exist_ok=True)
    coins = segment_coins()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}-') as scratch:
        fresh = Path(scratch) / 'new'
        for split, num in zip(SPLITS, (num_train, num_val), strict=True):
            write_split(fresh, split, num, size, seed, coins)
            write_classes(fresh, split, num, size, seed, coins)
        (fresh / MANIFEST).write_text(json.dumps(settings))
        if out.exists():
            out.rename(Path(scratch) / 'old')
        fresh.rename(out)
    return True


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Coins on textures, from photographs of scikit-image: masks, label maps and classes.'
    )
    parser.add_argument('--out', type=Path, default=Path('data/coins'), help='folder to write')
    parser.add_argument('--num-train', type=int, default=200, help='training images')
    parser.add_argument('--num-val', type=int, default=40, help='validation images')
    parser.add_argument('--size', type=int, default=256, help='image side in pixels')
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same files')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        made = make_demo_data(args.out, args.num_train, args.num_val, args.size, args.seed)
    except (DemoDataError, OSError) as error:
        print(f'make_demo_data: {error}', file=sys.stderr)
        return 1
    what = f'{args.num_train} train and {args.num_val} val images'
    print(f'{args.out}: {what} {"written" if made else "already there"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
