"""Annotations fit the model, or the run ends by naming the file, the label and the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import AnnotationError

# A sample's labels -> names of the heads that learn them. An RPN only tells objects from background.
_HEADS = {
    'gt_instances': re.compile(r'(?:.*\.)?\w*(?:bbox|mask|query)_head(?:\.\d+)*$'),
    'gt_sem_seg': re.compile(r'(?:decode|auxiliary)_head(?:\.\d+)*$'),
    'gt_label': re.compile(r'head$'),
}


@HOOKS.register_module()
class AnnotationCheckHook(Hook):
    """Check labels against the heads' ``num_classes``, and COCO files against the configured class names.

    Without it a label out of range is an index error deep in a loss (on a GPU, a device-side assertion), and the
    following COCO mistakes pass unnoticed: mmdet skips annotations of unknown categories, and numbers the classes in
    the order of the file whatever the order in ``metainfo``.

    Raises:
        AnnotationError: At the start of training or testing, or at the first batch that holds such a label.
    """

    def before_train(self, runner: Runner) -> None:
        """Check class names and annotation files of the training and validation sets."""
        heads = class_heads(unwrap(runner.model))
        check_classes(runner.train_dataloader.dataset, heads, runner)
        self._check_files(runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            self._check_files(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the annotation files of the test set."""
        self._check_files(runner.test_dataloader.dataset)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        check_batch(data_batch, class_heads(unwrap(runner.model)))

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        check_batch(data_batch, class_heads(unwrap(runner.model)))

    @staticmethod
    def _check_files(dataset: Any) -> None:
        if get_rank() == 0:  # once is enough for files of gigabytes
            for part in coco_datasets(dataset):
                check_coco_file(part.ann_file, part.metainfo['classes'])


def class_heads(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """For each kind of label, the head that knows the fewest classes, with its name."""
    found: dict[str, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, 'num_classes', None), int):
            continue
        for kind, pattern in _HEADS.items():
            fewest = found[kind][1].num_classes if kind in found else float('inf')
            if pattern.match(name) and 0 < module.num_classes < fewest:
                found[kind] = (name, module)
    return found


def check_classes(dataset: Any, heads: dict[str, tuple[str, Any]], runner: Runner) -> None:
    """Compare the number of class names with each head; more outputs than classes are only worth a warning."""
    classes: Any = getattr(dataset, 'metainfo', {}).get('classes')
    if isinstance(classes, str):
        raise AnnotationError(
            f"metainfo.classes is the string {classes!r}: write classes=('{classes}',), with the comma"
        )
    for name, head in heads.values() if classes else ():
        message = f'the training set names {len(classes)} classes, but model.{name}.num_classes={head.num_classes}'
        if head.num_classes < len(classes):
            raise AnnotationError(f'{message}: set both alike')
        if head.num_classes > len(classes):
            runner.logger.warning(f'{message}: the outputs left over will learn to stay silent')


def coco_datasets(dataset: Any) -> Iterator[Any]:
    """All data sets inside wrappers that mmdet's ``CocoDataset`` reads, by class names."""
    for inner in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
        if inner is not None:
            yield from coco_datasets(inner)
    load = getattr(type(dataset), 'load_data_list', None)
    # Looked up by name: this package must import where mmdet is absent.
    if getattr(load, '__qualname__', '') == 'CocoDataset.load_data_list':
        yield dataset


def check_coco_file(path: str, classes: tuple[str, ...]) -> None:
    """Check a COCO file's categories against the configured names, and its annotations against the categories."""
    if not Path(path).is_file():  # in a remote storage
        return
    not_finite: list[float] = []

    def keep(constant: str) -> float:
        not_finite.append(float(constant))
        return not_finite[-1]

    text = Path(path).read_text(encoding='utf-8')
    content = json.loads(text, parse_constant=keep)
    if not_finite:  # pycocotools ends the process on it, out of memory
        raise AnnotationError(f'{path}: {_place_of_no_number(content)}; remove or correct the annotation')
    categories = {category['id']: category['name'] for category in content.get('categories', [])}
    known = [name for name in categories.values() if name in set(classes)]
    if absent := [name for name in classes if name not in known]:
        raise AnnotationError(
            f'{path}: its categories {_some(list(categories.values()))} lack {_some(absent)} of metainfo.classes; '
            'make the names alike, spelling and case included'
        )
    if known != list(classes):
        raise AnnotationError(
            f'{path}: its categories come in the order {_some(known)}, metainfo.classes in {_some(list(classes))}; '
            'labels are numbered in the order of the file: bring metainfo.classes into it'
        )
    wrong = [a for a in content.get('annotations', []) if a.get('category_id') not in categories]
    if wrong:
        first = wrong[0]
        raise AnnotationError(
            f'{path}: annotation {first.get("id")} of image {first.get("image_id")} has '
            f'category_id={first.get("category_id")}, which is not among its categories {_some(list(categories))} '
            f'({len(wrong)} such annotations): correct the id, or add the category and raise num_classes'
        )


def _place_of_no_number(content: dict) -> str:
    for annotation in content.get('annotations', []):
        for key, entry in annotation.items():
            if found := re.search(r'\b(nan|inf)\b', repr(entry)):
                place = f'annotation {annotation.get("id")} of image {annotation.get("image_id")}'
                return f'{place} has {found.group()} in its {key}'
    return 'it holds NaN or infinity'


def check_batch(data_batch: Any, heads: dict[str, tuple[str, Any]]) -> None:
    """Check the labels of a training batch, before it goes to the model's device."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, Mapping) else None
    for sample in samples if isinstance(samples, list | tuple) else ():
        for kind, (name, head) in heads.items():
            labels = read_labels(sample, kind)
            if labels is None or labels.numel() == 0 or labels.is_floating_point():
                continue
            if kind == 'gt_sem_seg':
                labels = labels[labels != getattr(head, 'ignore_index', 255)]
            wrong = labels[(labels < 0) | (labels >= head.num_classes)]
            if wrong.numel():
                shown = torch.unique(wrong)[:6].tolist()
                raise AnnotationError(
                    f'{sample.metainfo.get("img_path", "an image without path")}: label '
                    f'{", ".join(map(str, shown))} lies outside 0 .. {head.num_classes - 1} '
                    f'(model.{name}.num_classes={head.num_classes}); {_REMEDIES[kind]}'
                )


_REMEDIES = {
    'gt_instances': 'correct the annotation, or raise num_classes in each head and name all classes in metainfo',
    'gt_sem_seg': 'correct the label map, raise num_classes in each head, or set the pixels to the ignored value '
    '(reduce_zero_label=True turns 0 into 255 and shifts the others down by one)',
    'gt_label': 'correct the label, or raise num_classes of the head',
}


def read_labels(sample: Any, kind: str) -> Tensor | None:
    """The integer labels of one kind in a data sample, ``None`` where it has none."""
    field = sample.get(kind) if hasattr(sample, 'get') else None
    if field is None or isinstance(field, Tensor):
        return field
    labels = field.get('labels') if kind == 'gt_instances' else field.get('data')
    return labels if isinstance(labels, Tensor) else None


def _some(items: list, limit: int = 8) -> str:
    shown = ', '.join(map(str, items[:limit])) or 'none'
    return f'[{shown}]' if len(items) <= limit else f'[{shown} and {len(items) - limit} more]'
