"""The table of what can be wrong with a data set, and what training does about it.

Each row was tried with mmdet 3.3.0, mmseg 1.2.2 and mmpretrain 1.2.0; ``docs/data_checks.md`` says how it went.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Severity(Enum):
    """An error ends a training or has it learn nonsense; a warning is dealt with by it, but worth knowing."""

    ERROR = 'error'
    WARNING = 'warning'


class Kind(NamedTuple):
    """A kind of finding: what it is, what training does about it, and what to do."""

    severity: Severity
    title: str
    harm: str
    remedy: str


_E, _W = Severity.ERROR, Severity.WARNING
_STOPS = 'stops when the loader draws the sample, or skips it where SkipBrokenSamplesHook is on'
_NO_LIST = 'stops while it builds the data set'
_COPY = 'copy the file again from its source, or take it out of the data set'
_BACKGROUND = 'drops the box in silence, and its object is learned as background'

KINDS: dict[str, Kind] = {
    # --- any file
    'file-missing': Kind(_E, 'file is missing', _STOPS, 'correct the path or data_prefix, or take the entry out'),
    'file-empty': Kind(_E, 'file of zero bytes', _STOPS, _COPY),
    'file-unreadable': Kind(_E, 'file cannot be read', _STOPS, 'mend its permissions or the storage'),
    'not-an-image': Kind(_E, 'file is no image', _STOPS, _COPY),
    'image-truncated': Kind(
        _E, 'image is cut off', 'stops, or with OpenCV 4 learns from a picture that is grey below', _COPY
    ),
    'image-damaged': Kind(_E, 'pixels are damaged', 'stops, or learns from a smeared picture (JPEG)', _COPY),
    'image-too-large': Kind(
        _E,
        'image declares more pixels than a loader should decode',
        'stops, or runs out of memory',
        'scale the image down, or take it out of the data set',
    ),
    'decoder-died': Kind(_E, 'decoding ended the process or took too long', 'dies with its data-loader worker', _COPY),
    'image-shrinks-to-nothing': Kind(
        _E,
        'image is so narrow that the resizing of the pipeline leaves no pixel',
        'stops in cv2.resize',
        'crop the image, or take it out of the data set',
    ),
    # --- images that are dealt with
    'image-narrow': Kind(_W, 'one side is over 50 times the other', 'learns from it', 'look whether it is meant'),
    'image-suspect': Kind(
        _W, 'JPEG with bytes that belong to nothing', 'learns from it', 'look whether the picture is whole'
    ),
    'image-tiny': Kind(_W, 'image of less than 16 pixels', 'learns from it', 'look whether it is meant'),
    'image-grayscale': Kind(_W, 'image without colours', 'repeats its channel three times', 'none needed'),
    'image-16-bit': Kind(_W, 'image with 16 bits a channel', 'keeps the upper 8', 'scale it to 8 bits as you want it'),
    'image-cmyk': Kind(
        _W, 'image in CMYK', 'converts it without colour profile', 'convert it to RGB where its colours matter'
    ),
    'image-palette': Kind(_W, 'image with a palette', 'looks the colours up', 'none needed'),
    'image-alpha': Kind(
        _W, 'image with transparency', 'drops it: what is transparent shows its hidden colour', 'none, or flatten it'
    ),
    'image-rotated': Kind(
        _W,
        'image that its EXIF data turn or mirror',
        'turns it; annotations must lie on the turned picture',
        'store it upright, such as with jpegtran or exiftran, where annotations were drawn on the stored pixels',
    ),
    'image-in-two-splits': Kind(
        _W, 'image in train and in another split', 'learns what it is tested on', 'take it out of one of them'
    ),
    # --- any data set
    'data-set-unreadable': Kind(_E, 'data set cannot be built', _NO_LIST, 'see the message'),
    'data-set-empty': Kind(
        _E, 'data set without samples', _NO_LIST, 'check ann_file, data_prefix, suffixes, filter_cfg'
    ),
    'sample-unreadable': Kind(_E, 'entry of a sample cannot be read', _STOPS, 'see the message'),
    # --- annotation files of COCO's format
    'json-malformed': Kind(_E, 'annotation file is no JSON', _NO_LIST, 'write the file again from its source'),
    'json-record': Kind(_E, 'entry has another form than COCO defines', _NO_LIST, 'correct or remove the entry'),
    'json-field-missing': Kind(_E, 'entry lacks a field', _NO_LIST, 'add the field; mmdet needs it'),
    'classes-missing': Kind(
        _E, 'categories lack names of metainfo.classes', 'stops at its start', 'make the names alike, case included'
    ),
    'classes-order': Kind(
        _E, 'categories come in another order than metainfo.classes', 'stops at its start', 'bring them into one order'
    ),
    'nothing-to-learn': Kind(
        _E, 'no annotation is left to learn from', _NO_LIST, 'check image ids, categories and metainfo.classes'
    ),
    'duplicate-image-id': Kind(
        _E,
        'several images with one id',
        'keeps the last one, and lays the boxes of all on it',
        'give each image an id of its own',
    ),
    'duplicate-annotation-id': Kind(_E, 'several annotations with one id', _NO_LIST, 'number the annotations anew'),
    'size-not-positive': Kind(
        _E, 'width or height of an image is not positive', 'drops all its boxes', 'write the true size'
    ),
    'size-differs': Kind(
        _E,
        'width and height differ from those of the decoded image',
        'cuts boxes at the wrong edge, and they may lie elsewhere',
        'write the true size; where the image was scaled or turned, scale or turn its annotations, too',
    ),
    'category-unknown': Kind(
        _E, 'category_id that is not among the categories', 'stops at its start', 'correct the id, or add the category'
    ),
    'box-malformed': Kind(_E, 'bbox is not a list of four numbers', _NO_LIST, 'write [x, y, width, height]'),
    'box-not-finite': Kind(
        _E, 'bbox holds NaN or infinity', 'drops or clips the box in silence', 'correct or remove the annotation'
    ),
    'box-negative': Kind(
        _E, 'bbox of negative size', _BACKGROUND, 'write [x, y, width, height], not two corners in any order'
    ),
    'box-outside': Kind(_E, 'bbox entirely outside the image', _BACKGROUND, 'correct it, or the size of the image'),
    'area-not-positive': Kind(
        _E, 'area of an annotation is not positive though its box is', _BACKGROUND, 'write the true area'
    ),
    'mask-missing': Kind(
        _E, 'annotation without segmentation, which the pipeline loads', _STOPS, 'add it, or set with_mask=False'
    ),
    'mask-malformed': Kind(_E, 'segmentation of no known form', _STOPS, 'write [[x1, y1, x2, y2, ...], ...] or an RLE'),
    'mask-not-finite': Kind(
        _E,
        'polygon with NaN, infinity or coordinates beyond 100 000',
        'is killed: pycocotools asks for memory without limit, which no hook can catch',
        'correct or remove the annotation',
    ),
    'mask-outside': Kind(
        _E, 'mask entirely outside the image', 'learns an empty mask', 'correct it, or the size of the image'
    ),
    'rle-size': Kind(_E, 'RLE of another size than the image', _STOPS, 'encode the mask anew at the size of the image'),
    'rle-sum': Kind(
        _E, 'RLE whose runs do not add up to the image', 'learns a mask that is partly noise', 'encode the mask anew'
    ),
    'image-without-annotation': Kind(
        _W,
        'image without annotations',
        'leaves it out with filter_cfg.filter_empty_gt, and learns it as background without',
        'none, where there is nothing in it',
    ),
    'annotation-of-no-image': Kind(
        _W, 'annotation of an image that is not in the file', 'ignores it', 'correct image_id, or remove it'
    ),
    'duplicate-file': Kind(_W, 'one file as several images or lines', 'shows it more often', 'remove one of them'),
    'box-degenerate': Kind(
        _W, 'bbox without area, or less than a pixel wide or high', 'drops the box in silence', 'correct or remove it'
    ),
    'box-beyond-edge': Kind(
        _W, 'bbox reaches over the edge by more than a pixel', 'clips the box', 'look whether the size is right'
    ),
    'polygon-dropped': Kind(
        _W,
        'polygon of less than three points, or an odd number of coordinates',
        'drops it; without another one, the annotation is ignored, its box included',
        'correct or remove it',
    ),
    'mask-beyond-edge': Kind(
        _W, 'mask reaches over the edge by more than a pixel', 'clips it', 'look whether the size is right'
    ),
    'rle-without-size': Kind(_W, 'RLE without size or counts', 'ignores the annotation', 'encode the mask anew'),
    # --- label maps
    'map-values': Kind(
        _E,
        'label map with values outside the classes',
        'stops at the first batch that holds it, or skips the sample where SkipBrokenSamplesHook is on',
        'correct the map, add the classes, or set the pixels to 255 (reduce_zero_label=True shifts all down by one)',
    ),
    'map-size': Kind(
        _E,
        'label map of another size than its image',
        'learns wrong labels: crops and padding hide it',
        'scale the map with nearest neighbours, or find the image it belongs to',
    ),
    'map-channels': Kind(
        _E, 'label map with several channels', 'stops, or takes colours for classes', 'write class numbers, one channel'
    ),
    'map-16-bit': Kind(
        _E, 'label map with values over 255', 'learns wrong labels: only the lower 8 bits are kept', 'write 8 bits'
    ),
    'map-line': Kind(_E, 'label map one pixel wide or high', _STOPS, 'take the sample out of the data set'),
    'map-unlabelled': Kind(
        _W, 'label map of ignored pixels only', 'learns nothing from it', 'take the sample out of the data set'
    ),
    # --- classification
    'label-malformed': Kind(
        _E, 'line that is not a path, a blank and a number', _NO_LIST, 'correct the line, or remove it'
    ),
    'label-out-of-range': Kind(
        _E,
        'label outside the classes',
        'stops at the first batch that holds it, or skips the sample where SkipBrokenSamplesHook is on',
        'correct the label, or raise num_classes',
    ),
    'label-contradiction': Kind(_E, 'one file under several labels', 'learns both', 'keep the right one'),
    'class-without-samples': Kind(
        _W,
        'class without samples',
        'never sees it',
        'fill or remove its folder (removing renumbers the classes after it)',
    ),
}
