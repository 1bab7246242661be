"""The table of what can be wrong with a data set, and what training does about it.

Each row was tried with mmdet 3.3.0, mmseg 1.2.2 and mmpretrain 1.2.0; ``docs/data_checks.md`` has the results.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Severity(Enum):
    """An error stops training or makes it learn wrong things; a warning is handled by it, but worth knowing."""

    ERROR = 'error'
    WARNING = 'warning'


class Kind(NamedTuple):
    """A kind of finding: what it is, what training does about it, and what to do.

    ``is_single`` says that it concerns one entry alone, not the data set: training starts with a few of these.
    """

    severity: Severity
    title: str
    effect: str
    remedy: str
    is_single: bool


_STOPS = 'stops when the sample is loaded, or skips it with SkipBrokenSamplesHook'
_STOPS_AT_LABEL = 'stops at the first batch with it, or skips the sample with SkipBrokenSamplesHook'
_AT_START = 'stops at its start'
_NOT_BUILT = 'stops while it builds the data set'
_DROPPED = 'drops the box silently; its object is learned as background'
_KILLED = 'is killed: pycocotools allocates memory without limit, which no hook can catch'
_COPY = 'copy the file again from its source, or remove it from the data set'
_CORRECT = 'correct or remove the annotation'
_CHECK = 'check whether that is intended'
_CHECK_SIZE = 'check whether the size of the image is right'
_ENCODE = 'encode the mask again, at the size of the image'
_FILE_SIZE = 'write the size of the image file; if it was scaled or rotated, transform its annotations alike'
_REMOVE_SAMPLE = 'remove the sample from the data set'
_VALUES = 'correct the map, add the class, or set ignore_index (reduce_zero_label=True subtracts one from all)'

_ERRORS = {
    # --- any file
    'file-missing': ('file is missing', _STOPS, 'correct the path or data_prefix, or remove the entry'),
    'file-empty': ('file of zero bytes', _STOPS, _COPY),
    'file-unreadable': ('file cannot be read', _STOPS, 'correct its permissions, the storage or the link'),
    'not-an-image': ('file is no image', _STOPS, _COPY),
    'image-truncated': ('image is truncated', 'stops, or with OpenCV 4 learns from an image whose end is grey', _COPY),
    'image-corrupt': ('pixels are corrupt', 'stops, or learns from a corrupt image (JPEG)', _COPY),
    'image-too-large': ('image is too large to decode', _STOPS, 'cut it into tiles'),
    'decoder-crash': ('decoding crashed or took too long', 'its data-loader worker crashes', _COPY),
    'image-resized-to-zero': (
        'image so narrow that Resize leaves no pixel',
        'stops in cv2.resize',
        'crop or remove it',
    ),
    'bands-differ': (
        'image of other bands than the model',
        'stops at the first batch',
        'set in_channels of the backbone, and mean and std of the data_preprocessor, to its number of bands',
    ),
    # --- any data set
    'dataset-unreadable': ('data set cannot be built', _NOT_BUILT, 'see the message'),
    'sample-unreadable': ('entry of a sample cannot be read', _STOPS, 'see the message'),
    'classes-differ': (
        'classes are not those of the training set',
        'learns other numbers than it is tested on: the score is far too low',
        'give all data sets the same folders (empty ones count), or an ann_file and the same metainfo.classes',
    ),
    'classes-shifted': ('reduce_zero_label differs between data sets', 'is tested on other numbers', 'set it alike'),
    'class-folder-hidden': ('folder of another program taken as a class', 'numbers it as a class', 'remove the folder'),
    # --- COCO annotation files
    'json-malformed': ('annotation file is no JSON', _NOT_BUILT, 'write the file again from its source'),
    'json-key-twice': ('key occurs twice in one object', 'uses the last value, drops the first', 'keep the right one'),
    'json-entry-malformed': ('entry does not have the form of COCO', _NOT_BUILT, 'correct or remove the entry'),
    'json-field-missing': ('entry lacks a field', _NOT_BUILT, 'add the field; mmdet needs it'),
    'id-type': (
        'id that is text in one place and a number in another, or text where pycocotools needs numbers',
        'ignores the annotation, or stops after the first epoch',
        'write all ids as numbers',
    ),
    'classes-missing': ('categories lack names of metainfo.classes', _AT_START, 'make the names alike, case included'),
    'classes-order': ('categories or folders are in another order than metainfo.classes', _AT_START, 'use their order'),
    'duplicate-image-id': ('several images with one id', 'uses the last, with the boxes of all', 'number them again'),
    'duplicate-annotation-id': ('several annotations with one id', _NOT_BUILT, 'number the annotations again'),
    'size-not-positive': ('width or height of an image is not positive', 'drops all its boxes', _FILE_SIZE),
    'size-differs': ('width and height are not those of the image file', 'clips boxes at the wrong edge', _FILE_SIZE),
    'category-unknown': (
        'category_id that is not among the categories',
        _DROPPED,
        'correct the id, or add the category and raise num_classes',
    ),
    'box-malformed': ('bbox or area is not made of numbers', _NOT_BUILT, 'write [x, y, width, height] and a number'),
    'box-not-finite': ('bbox holds NaN or infinity', 'drops or clips the box silently', _CORRECT),
    'box-negative': ('bbox of negative size', _DROPPED, 'write [x, y, width, height], not two corners'),
    'box-outside': ('bbox entirely outside the image', _DROPPED, 'correct it, or the size of the image'),
    'area-not-positive': ('area is not positive though the bbox is', _DROPPED, 'write the area of the mask or the box'),
    'boxes-normalised': ('boxes in parts of the image, as YOLO writes them', _DROPPED, 'write them in pixels'),
    'boxes-as-corners': (
        'boxes written as two corners',
        'learns boxes that are too large',
        'write [x, y, width, height]',
    ),
    'category-twice': ('several categories with the name of one class', _AT_START, 'remove the one without objects'),
    'iscrowd-unusable': (
        'iscrowd is not 0 or 1',
        'stops after the first epoch, in pycocotools, or ignores boxes whose iscrowd is text',
        'write "iscrowd": 0 (1 for a mask of many objects)',
    ),
    'evaluator-file': (
        'CocoMetric reads another file than the data set',
        'computes a wrong score',
        'set ann_file alike',
    ),
    'mask-missing': ('segmentation is missing, but loaded', _STOPS, 'add it, or set with_mask=False'),
    'mask-malformed': ('segmentation of unknown form', _STOPS, 'write [[x1, y1, x2, y2, ...], ...] or an RLE'),
    'mask-not-finite': ('polygon with NaN, infinity or coordinates beyond 100 000', _KILLED, _CORRECT),
    'mask-outside': ('mask entirely outside the image', 'learns an empty mask', 'correct it, or the size of the image'),
    'rle-size': ('RLE of another size than the image', _STOPS, _ENCODE),
    'rle-sum': ('RLE whose runs do not add up to the image', 'learns a mask that is partly noise', _ENCODE),
    # --- Pascal VOC
    'xml-malformed': ('annotation file is missing, no XML, or lacks a field', _NOT_BUILT, 'write the file again'),
    'names-unknown': (
        'objects with names that metainfo.classes lacks, though classes have no objects, or most are so',
        'drops them silently; they are learned as background',
        'make the names alike, case included, or add them to metainfo.classes',
    ),
    # follows from many of those above
    'dataset-empty': ('data set without samples', _NOT_BUILT, 'check ann_file, data_prefix, suffixes, filter_cfg'),
    'no-usable-annotation': ('no annotation can be used', _NOT_BUILT, 'check image ids, categories, metainfo.classes'),
    # --- label maps
    'map-values': ('label map with values outside the classes', _STOPS_AT_LABEL, _VALUES),
    'map-size': (
        'label map of another size than its image',
        'learns wrong labels: crops and padding hide it',
        'resize the map (nearest neighbour), or find its image',
    ),
    'map-channels': ('label map with several channels', 'stops, or reads colours as classes', 'write one channel'),
    'map-16-bit': ('label map with values over 255', 'learns wrong labels from the lower 8 bits', 'write 8 bits'),
    'map-lossy': ('label map as JPEG', 'learns values that the compression has changed', 'write PNG from the source'),
    'ignore-index-differs': (
        'value that only some of data set, heads and evaluators ignore',
        'stops at the first batch with it, or counts it as wrong in the score',
        'set ignore_index alike in the data set, each head and each evaluator',
    ),
    'maps-without-classes': (
        'all label maps together hold less than two classes',
        'learns to predict one class everywhere, with a high score',
        'write classes as 0 .. n-1 (1 for 255, which is ignored), or set ignore_index and num_classes to suit',
    ),
    'map-one-pixel-wide': ('label map one pixel wide or high', _STOPS, _REMOVE_SAMPLE),
    # --- classification
    'label-malformed': ('line is not a path, a space and a number', _NOT_BUILT, 'correct or remove the line'),
    'label-out-of-range': ('label outside the classes', _STOPS_AT_LABEL, 'correct the label, or raise num_classes'),
    'label-of-all': ('all samples have one label', 'learns to predict it everywhere', 'add samples of other classes'),
    'label-contradiction': ('one file with several labels', 'learns both', 'keep the right one'),
}
_WARNINGS = {
    # --- images
    'image-narrow': ('one side is over 50 times the other', 'learns from it', _CHECK),
    'image-extraneous-bytes': ('JPEG with extraneous bytes', 'learns from it', 'check whether the image is complete'),
    'image-tiny': ('image of less than 16 pixels', 'learns from it', _CHECK),
    'image-grayscale': ('grayscale image', 'repeats its channel three times', 'none needed'),
    'image-16-bit': ('image with 16 bits a channel', 'uses the upper 8', 'scale it to 8 bits as suits the data'),
    'image-cmyk': ('image in CMYK', 'converts it without colour profile', 'convert it to RGB where colours matter'),
    'image-palette': ('image with a palette', 'converts it', 'none needed'),
    'image-alpha': ('image with transparency', 'drops the alpha channel', 'none, or composite it on a background'),
    'image-rotated': (
        'image that its EXIF data rotate or mirror',
        'rotates it; annotations must fit the rotated image',
        'if annotations fit the stored pixels, remove the EXIF orientation',
    ),
    'image-in-two-splits': ('image in train and in another split', 'is tested on what it learned', 'keep it in one'),
    'classes-fewer': ('last classes have no folder', 'is not tested on these classes', 'none, or add their folders'),
    'classes-alike': ('class names that differ in case or spaces at most', 'learns them as several', _CHECK),
    # --- COCO annotation files
    'image-without-annotation': (
        'image without annotations',
        'skips it with filter_cfg.filter_empty_gt, else learns background',
        'none, where no object is in it',
    ),
    'iscrowd-missing': ('annotations without iscrowd', 'takes it as 0', 'none, where no mask covers a crowd'),
    'annotation-without-image': ('annotation of an image that is not in the file', 'ignores it', _CORRECT),
    'duplicate-file': ('one file as several images or lines', 'uses it more often', 'remove one of them'),
    'box-degenerate': ('bbox less than a pixel wide or high', 'drops the box silently', _CORRECT),
    'box-beyond-edge': ('bbox extends over the edge by more than a pixel', 'clips the box', _CHECK_SIZE),
    'polygon-dropped': (
        'polygon of less than three points, or an odd number of coordinates',
        'drops it; if it is the only one, ignores the annotation with its box',
        _CORRECT,
    ),
    'mask-beyond-edge': ('mask extends over the edge by more than a pixel', 'clips it', _CHECK_SIZE),
    'rle-without-size': ('RLE without size or counts', 'ignores the annotation', _ENCODE),
    'names-left-out': (
        'objects with names that metainfo.classes lacks',
        _DROPPED,
        'add the names, unless that is intended',
    ),
    # --- label maps, classification
    'padding-learned': (
        'padding of label maps is not ignored',
        'stops, or learns it',
        'set seg_pad_val to ignore_index',
    ),
    'ignore-index-unsaid': ('value that all but the data set ignore', 'ignores it', 'set its ignore_index, too'),
    'maps-of-one-class': ('all label maps to test on hold one class', 'computes a score of that class alone', _CHECK),
    'map-all-ignored': ('label map of ignored pixels only', 'learns nothing from it', _REMOVE_SAMPLE),
    'class-without-samples': (
        'class without samples',
        'never sees it',
        'fill its folder or remove it (renumbers others)',
    ),
}
# Errors of single boxes, masks, labels and images that training and evaluation get past.
_SINGLE = 'sample-unreadable label-out-of-range size-not-positive category-unknown area-not-positive box-not-finite '
_SINGLE += 'box-negative box-outside mask-missing mask-malformed mask-outside rle-size rle-sum'
KINDS = {name: Kind(Severity.ERROR, *row, name in _SINGLE.split()) for name, row in _ERRORS.items()}
KINDS |= {name: Kind(Severity.WARNING, *row, True) for name, row in _WARNINGS.items()}
