"""Predictions painted over their images, through supervision's annotators.

Detections are boxes, masks and labels in the colour of their class; a segmentation is one blend of the classes' colours
with a legend of those present; a classification is a list of the five most probable classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from mmengine.logging import print_log

from vheat_mm.apis.inference.class_table import best_classes
from vheat_mm.apis.inference.coco import kept_boxes
from vheat_mm.apis.inference.parts import result_file
from vheat_mm.apis.inference.slicing import import_supervision
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.apis.inference.video import VideoWriter
from vheat_mm.utils.text import some_of

if TYPE_CHECKING:
    from PIL import ImageFont

RGB = tuple[int, int, int]
_SMALLEST_TEXT, _TEXT_SHARE = 10, 0.026  # height in pixels; share of the image's shorter side
_LINES = 400  # how many widths of a box's lines the shorter side is
_READABLE, _WIDEST = 160, 1600  # pixels of the shorter and longer side, of an image enlarged for a list of classes
_OUTSIDE = 100  # pixels around an image beyond which OpenCV need not draw
_LABELLED = 0.25  # share of the image that labels may cover; those of the best boxes come first


def paint(
    prediction: Prediction,
    classes: Sequence[str],
    palette: Sequence[RGB],
    score_thr: float | None = None,
    opacity: float = 0.5,
    show_scores: bool = True,
) -> np.ndarray:
    """Paint a prediction over its image.

    Args:
        prediction: With its image. Of more than three bands the first three are shown, as blue, green and red; values
            of more than 8 bits are stretched from their 1st to their 99th percentile.
        classes: The model's.
        palette: Red, green and blue of each class, 0 to 255; supervision's own by number for a class without one.
        score_thr: Boxes with lower scores are not painted; all are by default.
        opacity: Of masks, from 0 to 1.
        show_scores: Write scores behind the names of classes; annotations have none.

    Returns:
        (H, W, 3) uint8 in BGR order, of the image's size; an image to classify with a side of less than 160 pixels is
        enlarged by a whole number, up to 1600. The prediction's image is left as it is.
    """
    if prediction.image is None:
        raise ValueError(f'{prediction.item.source}: no image to paint over: build the Predictor with keep_image=True')
    image = displayable(prediction.image)
    if prediction.task == 'classification':
        enlarge = max(1, min(-(-_READABLE // min(image.shape[:2])), _WIDEST // max(image.shape[:2])))
        image = image.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    look = _Look(
        tuple(' '.join(name.split()) for name in classes),
        palette,
        max(_SMALLEST_TEXT, round(_TEXT_SHARE * min(image.shape[:2]))),
        show_scores,
    )
    if prediction.label_map is not None:
        return _paint_label_map(image, prediction.label_map, look, opacity)
    if prediction.boxes is not None:
        return _paint_boxes(image, prediction, look, score_thr or 0.0, opacity)
    return _paint_classes(image, prediction, look)


def displayable(image: np.ndarray) -> np.ndarray:
    """A copy of an image as (H, W, 3) uint8, see :func:`paint`."""
    image = image[..., None] if image.ndim == 2 else image
    bands = image.shape[2]
    image = np.repeat(image[..., :1], 3, axis=2) if bands < 3 else image[..., :3]
    if image.dtype != np.uint8:
        low, high = np.percentile(image, (1, 99))
        image = np.clip((image.astype(np.float32) - low) * (255 / max(high - low, 1e-9)), 0, 255)
    return np.array(image, dtype=np.uint8, order='C')


class _Look(NamedTuple):
    """Names, colours and size of text."""

    classes: tuple[str, ...]
    palette: Sequence[RGB]
    text_size: int
    show_scores: bool = True

    def colour(self, label: int) -> RGB:
        """Red, green and blue of a class."""
        if 0 <= label < len(self.palette):
            red, green, blue = self.palette[label]
            return int(red), int(green), int(blue)
        return import_supervision('to paint').ColorPalette.DEFAULT.by_idx(label).as_rgb()

    def name(self, label: int) -> str:
        """A class's name, or its number where no font has the name's characters."""
        known = 0 <= label < len(self.classes)
        return self.classes[label] if known and _font_path(self.classes)[1][label] else f'class {label}'

    def font_path(self) -> str:
        return _font_path(self.classes)[0]


@functools.cache
def _font_path(names: tuple[str, ...]) -> tuple[str, tuple[bool, ...]]:
    """A font, and whether it has all characters of each name.

    DejaVu Sans, which matplotlib brings, if it has all; else the font of this machine that has most.
    """
    from matplotlib import font_manager, get_cachedir, get_data_path
    from matplotlib.ft2font import FT2Font

    def covers(path: str) -> tuple[bool, ...]:
        try:
            known = FT2Font(path).get_charmap()
        except (OSError, RuntimeError):  # no font that FreeType reads
            return (False,) * len(names)
        return tuple(all(ord(character) in known for character in name) for name in names)

    path = str(Path(get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'))
    covered = covers(path)
    if not all(covered):
        # Last Resort draws a frame for every character.
        others = {font.fname for font in font_manager.fontManager.ttflist if 'Last Resort' not in font.name}
        covered, path = max(
            [(covered, path), *((covers(other), other) for other in sorted(others))], key=lambda it: sum(it[0])
        )
    if lacking := [name for name, has in zip(names, covered, strict=True) if not has]:
        print_log(
            f'no font of this machine has all characters of {some_of(map(repr, lacking), 3)}: painted images show '
            'numbers of classes instead of such names. Install a font that has them, such as Noto Sans CJK, and delete '
            f"matplotlib's list of fonts in {get_cachedir()}",
            'current',
            level=30,
        )
    return path, covered


def _paint_boxes(
    image: np.ndarray, prediction: Prediction, look: _Look, score_thr: float, opacity: float
) -> np.ndarray:
    sv = import_supervision('to paint')
    from PIL import ImageFont
    from pycocotools import mask as rle

    found = kept_boxes(prediction, score_thr)
    if not len(found.scores):
        return image
    # The best last, so that it is on top.
    boxes, scores, labels = found.corners[::-1], found.scores[::-1], found.labels[::-1]
    height, width = image.shape[:2]
    masks = None
    if found.masks is not None:
        encoded = found.masks[::-1]
        # The mask's own box: that of the detector may cut it.
        around = np.asarray(rle.toBbox(encoded), dtype=np.float64)
        around[:, 2:] += around[:, :2] - 1
        masks = sv.CompactMask.from_coco_rle(encoded, around, (height, width))
    boxes = boxes.clip(-_OUTSIDE, np.array([width, height, width, height]) + _OUTSIDE)
    detections = sv.Detections(xyxy=boxes, mask=masks, confidence=scores, class_id=labels)
    # One colour a box, as supervision takes the number of a class modulo the length of its palette.
    colours = [look.colour(int(label)) for label in labels]
    by_index: dict[str, Any] = dict(color_lookup=sv.ColorLookup.INDEX)
    by_index['color'] = sv.ColorPalette([sv.Color(*colour) for colour in colours])
    if masks is not None:
        image = sv.MaskAnnotator(opacity=opacity, **by_index).annotate(image, detections)
    thickness = max(1, round(min(height, width) / _LINES))
    image = sv.BoxAnnotator(thickness=thickness, **by_index).annotate(image, detections)

    texts = [
        f'{look.name(int(label))}{f" {score:.2f}" if look.show_scores else ""}'
        for label, score in zip(labels, scores, strict=True)
    ]
    font = ImageFont.truetype(look.font_path(), look.text_size)
    covered = np.cumsum([font.getlength(text) * 1.5 * look.text_size for text in texts[::-1]])
    if not (fitting := int(np.count_nonzero(covered <= _LABELLED * height * width))):
        return image
    last = slice(len(texts) - fitting, None)
    by_index['color'] = sv.ColorPalette(by_index['color'].colors[last])
    readable = [sv.Color.BLACK if _is_light(colour) else sv.Color.WHITE for colour in colours[last]]
    return sv.RichLabelAnnotator(
        text_color=sv.ColorPalette(readable),
        font_path=look.font_path(),
        font_size=look.text_size,
        text_padding=max(1, look.text_size // 6),
        smart_position=True,  # else labels at the upper edge are outside of the image
        **by_index,
    ).annotate(image, detections[last], labels=texts[last])


def _is_light(colour: RGB) -> bool:
    """Whether black is easier to read on a colour than white."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140


def _paint_label_map(image: np.ndarray, label_map: np.ndarray, look: _Look, opacity: float) -> np.ndarray:
    import cv2

    ids = len(look.classes)
    counts = cv2.calcHist([label_map], [0], None, [ids], [0, ids]).reshape(-1)  # 40 times as fast as np.bincount
    table = np.zeros((int(np.iinfo(label_map.dtype).max) + 1, 3), np.uint8)
    table[:ids] = [look.colour(label)[::-1] for label in range(ids)]
    painted = cv2.addWeighted(table[label_map], opacity, image, 1 - opacity, 0)
    unlabelled = label_map >= ids  # 255, which mmseg ignores
    painted[unlabelled] = image[unlabelled]
    present = np.argsort(-counts, kind='stable')[: np.count_nonzero(counts)]
    rows = [
        _Row(f'{look.name(int(label))} {counts[label] / label_map.size:.1%}', look.colour(int(label)), 1)
        for label in present
    ]
    return _draw_panel(painted, rows, look, column=1)


def _paint_classes(image: np.ndarray, prediction: Prediction, look: _Look) -> np.ndarray:
    assert prediction.scores is not None
    best = best_classes(prediction.scores)
    rows = [
        _Row(
            f'{f"{score:.2f} " if look.show_scores else ""}{look.name(int(label))}',
            look.colour(int(label)),
            float(score),
        )
        for label, score in zip(best, prediction.scores[best], strict=True)
    ]
    return _draw_panel(image, rows, look, column=4)


class _Row(NamedTuple):
    text: str
    colour: RGB
    share: float  # of the column's width that is filled


def _draw_panel(image: np.ndarray, rows: Sequence[_Row], look: _Look, column: int) -> np.ndarray:
    """Draw rows of a coloured bar and a text on a dark ground in the upper left corner, half of the height at most.

    Args:
        image: (H, W, 3) uint8 in BGR order, drawn on in place.
        rows: Those that matter most first.
        look: Font and size of text.
        column: Width of the bars, in heights of a row.
    """
    from PIL import Image, ImageDraw, ImageFont

    font: ImageFont.FreeTypeFont = ImageFont.truetype(look.font_path(), look.text_size)
    height, gap = round(1.35 * look.text_size), max(2, look.text_size // 4)
    fitting = max(1, (image.shape[0] // 2 - gap) // height)
    if len(rows) > fitting:
        rows = [*rows[: max(1, fitting - 1)], _Row(f'and {len(rows) - max(1, fitting - 1)} more', (0, 0, 0), 0)][
            :fitting
        ]
    left = 2 * gap + column * (height - gap)
    wide = left + gap + int(max((font.getlength(row.text) for row in rows), default=0))
    under = image[: gap + height * len(rows), :wide]
    panel = Image.fromarray(np.ascontiguousarray(under[..., ::-1] // 4))
    draw = ImageDraw.Draw(panel)
    for number, row in enumerate(rows):
        top = gap + number * height
        if row.share > 0:
            end = gap + max(1, round(column * (height - gap) * row.share)) - 1
            draw.rectangle((gap, top, end, top + height - gap - 1), fill=row.colour)
        draw.text((left, top + (height - gap) // 2), row.text, font=font, fill=(255, 255, 255), anchor='lm')
    under[:] = np.asarray(panel)[..., ::-1]
    return image


class PaintedWriter:
    """Writes painted images and videos.

    Args:
        folder: Where results are mirrored.
        name_of: The name in ``folder`` of an input's result; its ending says the format, MP4 for videos.
        classes: The model's.
        palette: Red, green and blue of each class.
    """

    def __init__(
        self, folder: Path, name_of: Callable[[Item], str], classes: Sequence[str], palette: Sequence[RGB]
    ) -> None:
        self._folder, self._name_of = folder, name_of
        self._paint = functools.partial(paint, classes=classes, palette=palette)
        self._video: VideoWriter | None = None

    def write(self, prediction: Prediction) -> None:
        """Paint an image, or the next frame of a video; a video that ends with an error keeps its frames.

        Raises:
            ToolError: The disk is full; nothing of the image or video is left.
        """
        try:
            if prediction.error is None:
                target = self._folder / self._name_of(prediction.item)
                painted = self._paint(prediction)
                if prediction.item.is_video:
                    self._video = self._video or VideoWriter(target, prediction.fps)
                    self._video.write(painted)
                else:
                    _write_image(painted, target)
        finally:  # the next video gets a file of its own, also after an error
            if prediction.last and self._video is not None:
                video, self._video = self._video, None
                video.close()

    def close(self) -> None:
        """Remove a video that is not complete."""
        video, self._video = self._video, None
        if video is not None:
            video.abandon()


def _write_image(image: np.ndarray, target: Path) -> None:
    """Write (H, W, 3) uint8 in BGR order in the format that the name ends with."""
    import cv2

    suffix = target.suffix.lower()
    options = [] if suffix == '.png' else [cv2.IMWRITE_JPEG_QUALITY, 95]
    is_encoded, encoded = cv2.imencode(suffix, image, options)
    if not is_encoded:
        raise ValueError(f'OpenCV cannot encode {image.shape[1]} x {image.shape[0]} pixels as {suffix}')
    with result_file(target) as file:
        file.write(encoded.data)
