"""Compare annotations with the model, and name the file, the label and the remedy where they do not match."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from vheat_mm.datasets.checks.coco_labels import check_coco_file
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import AnnotationError

# A sample's labels -> names of the heads that learn them. An RPN only separates objects from background.
_HEADS = {
    'gt_instances': re.compile(r'(?:.*\.)?\w*(?:bbox|mask|query)_head(?:\.\d+)*$'),
    'gt_sem_seg': re.compile(r'(?:decode|auxiliary)_head(?:\.\d+)*$'),
    'gt_label': re.compile(r'head$'),
}
_REMEDIES = {
    'gt_instances': 'correct the annotation, or raise num_classes in each head and name all classes in metainfo',
    'gt_sem_seg': 'correct the label map, raise num_classes in each head, or set the pixels to the ignored value '
    '(reduce_zero_label=True turns 0 into 255 and shifts the others down by one)',
    'gt_label': 'correct the label, or raise num_classes of the head',
}


class Head(NamedTuple):
    """Name of a head in the model, and which labels it takes. Numbers only: data-loader workers get a copy."""

    name: str
    num_classes: int
    ignore_index: int


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
        check_classes(runner.train_dataloader.dataset, class_heads(unwrap(runner.model)), runner)
        self._check_files(runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            self._check_files(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the annotation files of the test set."""
        self._check_files(runner.test_dataloader.dataset)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch, before it goes to the model's device."""
        check_batch(data_batch, class_heads(unwrap(runner.model)))

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        check_batch(data_batch, class_heads(unwrap(runner.model)))

    @staticmethod
    def _check_files(dataset: Any) -> None:
        if get_rank() == 0:  # the files are the same for all ranks, and may hold gigabytes
            for part in coco_datasets(dataset):
                check_coco_file(part.ann_file, part.metainfo['classes'])


def class_heads(model: nn.Module) -> dict[str, Head]:
    """For each kind of label, the head that knows the fewest classes."""
    found: dict[str, Head] = {}
    for name, module in model.named_modules():
        number = getattr(module, 'num_classes', None)
        if not isinstance(number, int) or number < 1:
            continue
        for kind, pattern in _HEADS.items():
            if pattern.match(name) and (kind not in found or number < found[kind].num_classes):
                found[kind] = Head(name, number, getattr(module, 'ignore_index', 255))
    return found


def check_classes(dataset: Any, heads: dict[str, Head], runner: Runner) -> None:
    """Compare the number of class names with each head; more outputs than classes are only worth a warning."""
    classes: Any = getattr(dataset, 'metainfo', {}).get('classes')
    if isinstance(classes, str):
        raise AnnotationError(
            f"metainfo.classes is the string {classes!r}: write classes=('{classes}',), with the comma"
        )
    for head in heads.values() if classes else ():
        message = f'the training set names {len(classes)} classes, but model.{head.name}.num_classes={head.num_classes}'
        if head.num_classes < len(classes):
            raise AnnotationError(f'{message}: set both alike')
        if head.num_classes > len(classes):
            runner.logger.warning(f'{message}: the last {head.num_classes - len(classes)} logits are unused')


def coco_datasets(dataset: Any) -> Iterator[Any]:
    """All data sets inside wrappers that mmdet's ``CocoDataset`` reads."""
    for inner in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
        if inner is not None:
            yield from coco_datasets(inner)
    load = getattr(type(dataset), 'load_data_list', None)
    # By name: this package can be imported without mmdet.
    if getattr(load, '__qualname__', '') == 'CocoDataset.load_data_list':
        yield dataset


def check_batch(data_batch: Any, heads: dict[str, Head]) -> None:
    """Check the labels of a batch.

    Raises:
        AnnotationError: A label lies outside of what its head knows.
    """
    samples = data_batch.get('data_samples') if isinstance(data_batch, Mapping) else None
    for sample in samples if isinstance(samples, list | tuple) else ():
        for kind, head in heads.items():
            labels = read_labels(sample, kind)
            if labels is None or labels.numel() == 0 or labels.is_floating_point():
                continue
            if kind == 'gt_sem_seg':
                labels = labels[labels != head.ignore_index]
            wrong = labels[(labels < 0) | (labels >= head.num_classes)]
            if wrong.numel():
                raise AnnotationError(
                    f'{sample.metainfo.get("img_path", "an image without path")}: label '
                    f'{", ".join(map(str, torch.unique(wrong)[:6].tolist()))} lies outside 0 .. {head.num_classes - 1} '
                    f'(model.{head.name}.num_classes={head.num_classes}); {_REMEDIES[kind]}'
                )


def read_labels(sample: Any, kind: str) -> Tensor | None:
    """The integer labels of one kind in a data sample, ``None`` where it has none."""
    field = sample.get(kind) if hasattr(sample, 'get') else None
    if field is None or isinstance(field, Tensor):
        return field
    labels = field.get('labels') if kind == 'gt_instances' else field.get('data')
    return labels if isinstance(labels, Tensor) else None
