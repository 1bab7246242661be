"""Small data sets with one fault per file, beside good samples.

A fault has the same name in all of them: the image ``truncated_jpeg.jpg`` is also the sample of
``annotations/image_truncated_jpeg.json`` (COCO), of ``splits/truncated_jpeg.txt`` (ADE20K layout), and a file in
``train/disc/`` (one folder per class).
"""

from __future__ import annotations

import copy
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
CLASSES = ('box', 'disc')
GOOD = ('good_0', 'good_1', 'good_2', 'good_3')


def picture(index: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Noise with one bright box, (height, width, 3) in 0..255; the box covers columns 8..39 and rows 8..31."""
    image = np.random.default_rng(index).integers(0, 90, (height, width, 3), dtype=np.uint8)
    image[8:32, 8:40] += 120
    return image


def encode(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    """An image as the bytes of a file; ``form`` is Pillow's name, such as ``'JPEG'``."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


# --- images


def _truncated(form: str, share: float = 0.5) -> bytes:
    content = encode(picture(), form)
    return content[: int(len(content) * share)]


def _damaged_jpeg() -> bytes:
    """A block of random bytes inside the pixels, as after a disk error; both ends are intact."""
    content = bytearray(encode(picture(), 'JPEG'))
    block = np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8).tobytes()
    content[len(content) // 2 : len(content) // 2 + len(block)] = block
    return bytes(content)


def _stray_bytes() -> bytes:
    """Extraneous bytes before the end, as some encoders write; the image is intact."""
    content = encode(picture(), 'JPEG')
    return content[:-2] + b'\x01' * 60 + content[-2:]


def _half_written_jpeg() -> bytes:
    """Full length, but zeros from the middle on, as after an interrupted download into a preallocated file."""
    content = encode(picture(0, 240, 320), 'JPEG')
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def _damaged_png() -> bytes:
    content = bytearray(encode(picture(), 'PNG'))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def _rotated() -> bytes:
    """Stored as 64 x 48, to be shown rotated: 48 x 64."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(), 'JPEG', exif=exif)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))


def png(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header says ``width`` x ``height``."""
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b'\x89PNG\r\n\x1a\n' + _chunk(b'IHDR', header) + _chunk(b'IDAT', pixels) + _chunk(b'IEND', b'')


def _sixteen_bit() -> bytes:
    return encode(picture()[..., 0].astype(np.uint16) * 257, 'PNG')


def _alpha() -> bytes:
    opaque = np.full((HEIGHT, WIDTH, 1), 128, np.uint8)
    return encode(np.concatenate([picture(), opaque], axis=2), 'PNG')


# name -> suffix, content (``None``: the file is missing), kinds of findings
IMAGE_FAULTS: dict[str, tuple[str, Callable[[], bytes] | None, set[str]]] = {
    'missing': ('.jpg', None, {'file-missing'}),
    'zero_bytes': ('.jpg', bytes, {'file-empty'}),
    'no_image': ('.jpg', lambda: b'<html>404: not found</html>' * 20, {'not-an-image'}),
    'truncated_jpeg': ('.jpg', lambda: _truncated('JPEG'), {'image-truncated'}),
    'truncated_png': ('.png', lambda: _truncated('PNG'), {'image-truncated'}),
    'half_written_jpeg': ('.jpg', _half_written_jpeg, {'image-truncated'}),
    'damaged_jpeg': ('.jpg', _damaged_jpeg, {'image-corrupt'}),
    'damaged_png': ('.png', _damaged_png, {'image-corrupt'}),
    'stray_bytes': ('.jpg', _stray_bytes, {'image-extraneous-bytes'}),
    'bomb': ('.png', lambda: png(60_000, 60_000), {'image-too-large'}),
    'one_pixel': ('.png', lambda: encode(picture()[:1, :1], 'PNG'), {'image-tiny'}),
    'grayscale': ('.jpg', lambda: encode(picture()[..., 0], 'JPEG'), {'image-grayscale'}),
    'sixteen_bit': ('.png', _sixteen_bit, {'image-16-bit', 'image-grayscale'}),
    'cmyk': ('.jpg', lambda: encode(Image.fromarray(picture()).convert('CMYK'), 'JPEG'), {'image-cmyk'}),
    'rotated': ('.jpg', _rotated, {'image-rotated'}),
    'wide': ('.png', lambda: encode(picture(0, 40, 20_000) // 64, 'PNG'), {'image-narrow'}),
    'palette': ('.png', lambda: encode(Image.fromarray(picture()).convert('P'), 'PNG'), {'image-palette'}),
    'alpha': ('.png', _alpha, {'image-alpha'}),
}
# (width, height) of the files above that are not WIDTH x HEIGHT once decoded
SIZES = {'half_written_jpeg': (320, 240), 'one_pixel': (1, 1), 'wide': (20_000, 40)}


def write_good(folder: Path, suffix: str = '.jpg') -> dict[str, Path]:
    """Write the good images only; returns the path by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f'{name}{suffix}' for name in GOOD}
    for index, path in enumerate(paths.values()):
        path.write_bytes(encode(picture(index), 'JPEG'))
    return paths


def write_images(folder: Path, suffix: str | None = None) -> dict[str, Path]:
    """Write the good images and those with faults; returns the path by name, also of the missing one.

    Args:
        folder: Created if it does not exist.
        suffix: For all files, whatever their format (decoders read the content); by default each has its own.
    """
    paths = write_good(folder, suffix or '.jpg')
    for name, (own_suffix, make, _) in IMAGE_FAULTS.items():
        paths[name] = folder / f'{name}{suffix or own_suffix}'
        if make is not None:
            paths[name].write_bytes(make())
    return paths


# --- COCO


def coco_content(files: dict[str, Path]) -> dict[str, Any]:
    """A COCO file's content: each image with one box and its polygon, ids from 1 in the order of ``files``."""
    images, annotations = [], []
    for index, (name, path) in enumerate(files.items(), start=1):
        width, height = SIZES.get(name, (WIDTH, HEIGHT))
        images.append(dict(id=index, file_name=path.name, width=width, height=height))
        x, y, w, h = (0, 0, 1, 1) if name == 'one_pixel' else (8, 8, 32, 24)
        annotations.append(
            dict(
                id=index,
                image_id=index,
                category_id=1 + index % 2,
                bbox=[x, y, w, h],
                area=w * h,
                iscrowd=0,
                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
            )
        )
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
    return dict(images=images, annotations=annotations, categories=categories)


def _change(part: str = 'annotations', **fields: Any) -> Callable[[dict], Any]:
    """Change the first annotation or image; ``None`` removes the field."""

    def change(content: dict) -> None:
        merged = content[part][0] | fields
        content[part][0] = {key: value for key, value in merged.items() if value is not None}

    return change


def _duplicate(part: str, **fields: Any) -> Callable[[dict], Any]:
    return lambda content: content[part].append({**copy.deepcopy(content[part][0]), **fields})


def _box(*numbers: float) -> Callable[[dict], Any]:
    return _change(bbox=list(numbers))


def _mask(value: Any) -> Callable[[dict], Any]:
    return _change(segmentation=value)


NAN, INFINITY = float('nan'), float('inf')
# name -> change of a good file, which stays valid JSON, and kinds of findings (some others need the images, too)
ANNOTATION_FAULTS: dict[str, tuple[Callable[[dict], Any], set[str]]] = {
    'no_annotations_of_image': (lambda c: c['annotations'].pop(0), {'image-without-annotation'}),
    'no_annotations': (lambda c: c['annotations'].clear(), {'image-without-annotation', 'no-usable-annotation'}),
    'no_annotations_key': (lambda c: c.pop('annotations'), {'image-without-annotation', 'no-usable-annotation'}),
    'no_images': (lambda c: c.update(images=[], annotations=[]), set()),
    'box_outside': (_box(200, 8, 32, 24), {'box-outside'}),
    'box_partly_outside': (_box(40, 8, 64, 24), {'box-beyond-edge'}),
    'box_zero_size': (_box(8, 8, 0, 24), {'box-degenerate'}),
    'box_negative_size': (_box(40, 32, -32, -24), {'box-negative'}),
    'box_below_one_pixel': (_box(8, 8, 0.5, 24), {'box-degenerate'}),
    'box_nan': (_box(NAN, 8, 32, 24), {'box-not-finite'}),
    'box_infinite': (_box(8, 8, INFINITY, 24), {'box-not-finite'}),
    'box_three_numbers': (_box(8, 8, 32), {'box-malformed'}),
    'box_text': (_change(bbox=['8', '8', '32', '24']), {'box-malformed'}),
    'box_missing': (_change(bbox=None), {'json-field-missing'}),
    'area_zero': (_change(area=0), {'area-not-positive'}),
    'area_missing': (_change(area=None), {'json-field-missing'}),
    'polygon_two_points': (_mask([[8, 8, 40, 32]]), {'polygon-dropped'}),
    'polygon_odd': (_mask([[8, 8, 40, 8, 40, 32, 8]]), {'polygon-dropped'}),
    'polygon_outside': (_mask([[200, 200, 240, 200, 240, 240]]), {'mask-outside'}),
    'polygon_partly_outside': (_mask([[8, 8, 90, 8, 90, 32, 8, 32]]), {'mask-beyond-edge'}),
    'polygon_nan': (_mask([[8, NAN, 40, 8, 40, 32]]), {'mask-not-finite'}),
    'polygon_flat': (_mask([8, 8, 40, 8, 40, 32]), {'mask-malformed'}),
    'mask_missing': (_change(segmentation=None), {'mask-missing'}),
    'mask_empty': (_mask([]), {'mask-missing'}),
    'rle_wrong_size': (_mask(dict(size=[10, 10], counts=[20, 30, 50])), {'rle-size'}),
    'rle_wrong_sum': (_mask(dict(size=[HEIGHT, WIDTH], counts=[20, 30])), {'rle-sum'}),
    'rle_without_size': (_mask(dict(counts=[20, 30, 50])), {'rle-without-size'}),
    'rle_garbage': (_mask(dict(size=[HEIGHT, WIDTH], counts='not an RLE')), {'mask-malformed'}),
    'crowd_missing': (_change(iscrowd=None), {'iscrowd-missing'}),
    'crowd_text': (_change(iscrowd='0'), {'iscrowd-unusable'}),
    'root_category': (lambda c: c['categories'].append(dict(id=9, name='box')), {'category-twice'}),
    'boxes_as_corners': (
        lambda c: [entry.update(bbox=[20, 16, 60, 44]) for entry in c['annotations']],
        {'boxes-as-corners', 'box-beyond-edge'},
    ),
    'category_unknown': (_change(category_id=9), {'category-unknown'}),
    'category_missing': (_change(category_id=None), {'json-field-missing'}),
    'annotation_of_no_image': (_change(image_id=99), {'annotation-without-image', 'image-without-annotation'}),
    'image_id_missing': (_change(image_id=None), {'image-without-annotation', 'json-field-missing'}),
    'annotation_id_missing': (_change(id=None), {'json-field-missing'}),
    'duplicate_annotation_id': (_change(id=2), {'duplicate-annotation-id'}),
    'duplicate_image_id': (_duplicate('images', file_name='good_1.jpg'), {'duplicate-image-id'}),
    'duplicate_file': (_duplicate('images', id=50), {'image-without-annotation'}),
    'size_wrong': (_change('images', width=WIDTH * 2, height=HEIGHT * 2), set()),
    'size_swapped': (_change('images', width=HEIGHT, height=WIDTH), set()),
    'size_zero': (_change('images', width=0, height=0), {'size-not-positive'}),
    'size_missing': (_change('images', width=None), {'json-field-missing'}),
    'file_name_missing': (_change('images', file_name=None), {'json-field-missing'}),
}
# name -> change of a good file's text
TEXT_FAULTS: dict[str, Callable[[str], str]] = {
    'json_cut': lambda text: text[: len(text) // 2],
    'json_comma': lambda text: text.replace('"iscrowd": 0,', '"iscrowd": 0', 1),
    'json_list': lambda text: f'[{text}]',
    'json_zero_bytes': lambda text: '',
}


def make_corrupt_coco(folder: Path) -> dict[str, Path]:
    """Write a COCO data set below ``folder``: ``images/`` and ``annotations/*.json``, classes of :data:`CLASSES`.

    Returns:
        Annotation files by name: ``good`` (good images only), ``images`` (good images and every corrupt one),
        ``image_<fault>`` (good images and that one) for each of :data:`IMAGE_FAULTS`, and ``<fault>`` (good images,
        the first annotation changed) for each of :data:`ANNOTATION_FAULTS` and :data:`TEXT_FAULTS`.
    """
    images = write_images(folder / 'images')
    (folder / 'annotations').mkdir(parents=True, exist_ok=True)
    good = {name: images[name] for name in GOOD}
    contents = dict(good=coco_content(good), images=coco_content(images))
    for name in IMAGE_FAULTS:
        contents[f'image_{name}'] = coco_content({**good, name: images[name]})
    for name, (change, _) in ANNOTATION_FAULTS.items():
        contents[name] = coco_content(good)
        change(contents[name])
    texts = {name: json.dumps(content, indent=1) for name, content in contents.items()}
    texts |= {name: change(texts['good']) for name, change in TEXT_FAULTS.items()}
    files = {name: folder / 'annotations' / f'{name}.json' for name in texts}
    for name, path in files.items():
        path.write_text(texts[name], encoding='utf-8')
    return files


# --- segmentation, ADE20K layout


def label_map() -> np.ndarray:
    """0 (unlabelled) at the border, 1 around the box, 2 on it: with ``reduce_zero_label`` ignored, class 0, class 1."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[4:-4, 4:-4] = 1
    labels[8:32, 8:40] = 2
    return labels


def _with(value: int) -> np.ndarray:
    labels = label_map()
    labels[20:24, 20:24] = value
    return labels


def _coloured() -> bytes:
    return encode(np.array([[0, 0, 0], [200, 60, 60], [60, 60, 200]], np.uint8)[label_map()], 'PNG')


def _palette_map() -> bytes:
    image = Image.fromarray(label_map(), mode='L').convert('P')
    image.putdata(label_map().flatten().tolist())
    return encode(image, 'PNG')


# name -> content (``None``: the file is missing), kinds of findings
MAP_FAULTS: dict[str, tuple[Callable[[], bytes] | None, set[str]]] = {
    'map_missing': (None, {'file-missing'}),
    'map_zero_bytes': (bytes, {'file-empty'}),
    'map_no_image': (lambda: b'<html>404: not found</html>' * 20, {'not-an-image'}),
    'map_truncated': (lambda: encode(_with(2), 'PNG')[:60], {'image-truncated'}),
    'map_value_too_high': (lambda: encode(_with(200), 'PNG'), {'map-values'}),
    'map_other_size': (lambda: encode(label_map()[:24, :32], 'PNG'), {'map-size'}),
    'map_three_channels': (_coloured, {'map-channels'}),
    'map_palette': (_palette_map, set()),
    'map_sixteen_bit': (lambda: encode(_with(2).astype(np.uint16) * 256 + 1, 'PNG'), {'map-16-bit'}),
    'map_unlabelled': (lambda: encode(np.zeros((HEIGHT, WIDTH), np.uint8), 'PNG'), {'map-all-ignored'}),
    'map_value_255': (lambda: encode(_with(255), 'PNG'), set()),
}


def make_corrupt_ade(folder: Path) -> dict[str, Path]:
    """Write a segmentation data set in ADE20K's layout: ``images/*.jpg``, ``annotations/*.png``, ``splits/*.txt``.

    For ``BaseSegDataset`` with ``reduce_zero_label=True`` and two classes. All images have the suffix ``.jpg``,
    whatever their format.

    Returns:
        Files for ``ann_file``, by name: ``good``, ``all``, and for each of :data:`IMAGE_FAULTS` and
        :data:`MAP_FAULTS` the good samples and the corrupt one.
    """
    images = write_images(folder / 'images', '.jpg')
    maps = folder / 'annotations'
    maps.mkdir(parents=True, exist_ok=True)
    for name in images:
        width, height = SIZES.get(name, (WIDTH, HEIGHT))
        labels = np.resize(label_map(), (height, width)) if name in SIZES else label_map()
        labels = labels.T if name == 'rotated' else labels
        (maps / f'{name}.png').write_bytes(encode(np.maximum(labels, 1) if name == 'one_pixel' else labels, 'PNG'))
    for index, (name, (make, _)) in enumerate(MAP_FAULTS.items()):
        (folder / 'images' / f'{name}.jpg').write_bytes(encode(picture(index), 'JPEG'))
        if make is not None:
            (maps / f'{name}.png').write_bytes(make())
    faults = [*IMAGE_FAULTS, *MAP_FAULTS]
    lists = dict(good=GOOD, all=(*GOOD, *faults)) | {name: (*GOOD, name) for name in faults}
    return _write_lists(folder / 'splits', {name: list(samples) for name, samples in lists.items()})


# --- classification, one folder per class

# name -> line of the list, kinds of findings
LABEL_FAULTS = {
    'label_too_high': ('box/good_0.jpg 7', {'label-contradiction', 'label-out-of-range'}),
    'label_negative': ('box/good_0.jpg -1', {'label-contradiction', 'label-out-of-range'}),
    'label_text': ('box/good_0.jpg box', {'label-malformed'}),
    'label_absent': ('box/good_0.jpg', {'label-malformed'}),
    'label_line_empty': ('', {'label-malformed'}),
    'label_contradiction': ('box/good_0.jpg 1', {'label-contradiction'}),
}


def make_corrupt_folder(folder: Path) -> dict[str, Path]:
    """Write a classification data set: ``train/box`` (good), ``train/disc`` (good and corrupt), ``train/empty``.

    Returns:
        Files for ``ann_file`` below ``meta/`` (paths below ``train/`` and labels of :data:`CLASSES`), by name:
        ``good``, ``all``, and for each of :data:`IMAGE_FAULTS` and :data:`LABEL_FAULTS` the good samples and the
        corrupt one.
    """
    good = write_good(folder / 'train' / 'box').values()
    paths = write_images(folder / 'train' / 'disc')
    (folder / 'train' / 'empty').mkdir(exist_ok=True)
    lines = [f'box/{path.name} 0' for path in good] + [f'disc/{paths[name].name} 1' for name in GOOD]
    corrupt = {name: f'disc/{paths[name].name} 1' for name in IMAGE_FAULTS}
    lists = dict(good=lines, all=[*lines, *corrupt.values()])
    corrupt |= {name: line for name, (line, _) in LABEL_FAULTS.items()}
    lists |= {name: [*lines, line] for name, line in corrupt.items()}
    return _write_lists(folder / 'meta', lists)


def _write_lists(folder: Path, lists: dict[str, list[str]]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        (folder / f'{name}.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return {name: folder / f'{name}.txt' for name in lists}
