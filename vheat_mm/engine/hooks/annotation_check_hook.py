"""Check annotations at the start, and labels against the model; name the file, the label and the remedy."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from vheat_mm.datasets.checks.check import check_labels
from vheat_mm.datasets.checks.kinds import KINDS
from vheat_mm.datasets.checks.report import Report
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import AnnotationError, describe
from vheat_mm.utils.text import some_of

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
    """Check annotation files at the start, and the labels of each batch against the heads' ``num_classes``.

    The first part is that of ``tools/misc/check_dataset.py``, without decoding images. ``tools/train.py`` and
    ``tools/test.py`` run it before they build the data sets, whose own readers may hang or stop without naming a file;
    elsewhere it runs before the first iteration. Rank 0 reads the files. An error in the data set as a whole, or in
    more than 1 % of its entries, ends the run; a few faulty entries and warnings are counted in the log.

    Args:
        files: Whether to check annotation files.
        allow: Kinds of findings (``docs/data_checks.md``) that do not end the run.

    Raises:
        ValueError: ``allow`` holds an unknown kind.
        AnnotationError: At the start, or at the first batch that holds a label out of range.
    """

    def __init__(self, files: bool = True, allow: Sequence[str] = ()) -> None:
        if unknown := [kind for kind in allow if kind not in KINDS]:
            raise ValueError(f'AnnotationCheckHook: allow={unknown} are no kinds of findings; see docs/data_checks.md')
        self._allow = tuple(allow)
        self._checked: set[str] = set() if files else {'train', 'val', 'test'}
        self._learned: Any = None  # class names in the checkpoint
        self._heads: dict[str, Head] | None = None

    def check_files(self, runner: Runner, splits: Iterable[str]) -> None:
        """Check the annotation files of a runner's data sets, once for each split.

        Args:
            runner: Its data sets need not be built. Those that are no part of its config are not checked.
            splits: Of ``'train'``, ``'val'``, ``'test'``.

        Raises:
            AnnotationError: On all ranks, if a file has an error.
            ToolError: A data set cannot be built.
        """
        splits = [name for name in splits if name not in self._checked and _has_dataset(runner.cfg, name)]
        self._checked.update(splits)
        if not splits:
            return
        error, text = None, ['']
        if get_rank() == 0:  # the files are the same for all ranks
            try:
                self._report(runner, splits)
            except Exception as caught:
                error, text = caught, [describe(caught)]
        broadcast_object_list(text)
        if text[0]:
            raise error or AnnotationError(text[0])

    def _report(self, runner: Runner, splits: list[str]) -> None:
        started = time.monotonic()
        report = check_labels(runner.cfg, splits)
        counts = {kind: count for kind, count in report.counts.items() if kind not in self._allow}
        errors = [kind for kind in KINDS if kind in counts and report.ends_run(kind)]
        for kind in KINDS:
            if kind in report.counts and kind not in errors:
                runner.logger.warning(_sentence(report, kind))
        for kind in errors[1:]:
            runner.logger.error(_sentence(report, kind))
        runner.logger.info(f'annotations checked in {time.monotonic() - started:.1f} s: {"; ".join(report.checked)}')
        if errors:
            hint = ''
            if not any(KINDS[kind].effect.startswith('stops') for kind in errors):
                hint = f'. To accept them, set custom_hooks=[dict(type="AnnotationCheckHook", allow={errors})]'
            raise AnnotationError(
                f'{_sentence(report, errors[0])}\npython tools/misc/check_dataset.py CONFIG lists all errors '
                f'({sum(counts[kind] for kind in errors)}){hint}'
            )

    def before_train(self, runner: Runner) -> None:
        """Check the training and validation sets, and the number of class names."""
        check_classes(runner.train_dataloader.dataset, self._find_heads(runner), runner)
        self.check_files(runner, ('train', 'val') if runner.val_loop is not None else ('train',))

    def _find_heads(self, runner: Runner) -> dict[str, Head]:
        if self._heads is None:  # once, as it looks at each module
            self._heads = class_heads(unwrap(runner.model))
        return self._heads

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the names of the classes that the weights have learned."""
        meta = checkpoint.get('meta')
        trained_on = meta.get('dataset_meta') if isinstance(meta, Mapping) else None
        self._learned = trained_on.get('classes') if isinstance(trained_on, Mapping) else None

    def before_test(self, runner: Runner) -> None:
        """Check the test set, and compare its class names with those in the checkpoint."""
        self.check_files(runner, ('test',))
        metainfo = getattr(runner.test_dataloader.dataset, 'metainfo', {})
        classes = metainfo.get('classes') if isinstance(metainfo, Mapping) else None
        names = [[*value] if isinstance(value, list | tuple) else [] for value in (self._learned, classes)]
        if not all(names) or names[0] == names[1]:
            return
        message = (
            f'the test set has the classes [{some_of(names[1])}], and the weights have learned [{some_of(names[0])}]; '
            f'{KINDS["classes-differ"].remedy}'
        )
        if set(map(str, names[0])) & set(map(str, names[1])) and 'classes-differ' not in self._allow:
            raise AnnotationError(message)
        runner.logger.warning(message)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the bands and labels of a batch, before it goes to the model's device."""
        check_bands(data_batch, count_bands(unwrap(runner.model)))
        check_batch(data_batch, self._find_heads(runner))

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        check_batch(data_batch, self._find_heads(runner))


def check_annotations(runner: Runner, splits: Iterable[str]) -> None:
    """Let a runner's ``AnnotationCheckHook`` check files before the data sets are built."""
    for hook in runner.hooks:
        if isinstance(hook, AnnotationCheckHook):
            hook.check_files(runner, splits)


def _has_dataset(cfg: Config, split: str) -> bool:
    loader = cfg.get(f'{split}_dataloader')
    return isinstance(loader, dict) and isinstance(loader.get('dataset'), dict)


def _sentence(report: Report, kind: str) -> str:
    """The first finding of a kind, how many there are, and what to do."""
    about, count = KINDS[kind], report.counts[kind]
    more = f' ({count} of this kind)' if count > 1 else ''
    return f'{report.kept[kind][0]}: {about.title} [{kind}]{more}; {about.remedy}'


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
    found = getattr(dataset, 'metainfo', {})
    for metainfo in found if isinstance(found, list) else [found]:  # mmdet's ConcatDataset has a list of them
        classes: Any = metainfo.get('classes')
        if isinstance(classes, str):
            raise AnnotationError(
                f"metainfo.classes is the string {classes!r}: write classes=('{classes}',), with the comma"
            )
        for head in heads.values() if classes is not None and len(classes) else ():
            message = (
                f'the training set names {len(classes)} classes, but model.{head.name}.num_classes={head.num_classes}'
            )
            if head.num_classes < len(classes):
                raise AnnotationError(f'{message}: set both alike')
            if head.num_classes > len(classes):
                runner.logger.warning(f'{message}: the last {head.num_classes - len(classes)} logits are unused')


def count_bands(model: nn.Module) -> int:
    """Number of bands of the ``mean`` that the libraries' preprocessors subtract from images; 1 where there is none."""
    preprocessor: Any = getattr(model, 'data_preprocessor', None)
    mean = getattr(preprocessor, 'mean', None)
    return len(mean) if isinstance(mean, Tensor) and type(preprocessor).__module__.startswith('mm') else 1


def check_bands(data_batch: Any, expected: int) -> None:
    """Compare the bands of a batch's images, (bands, height, width), with those of the mean.

    Raises:
        AnnotationError: An image has another number, and neither is one, which fits any.
    """
    if not isinstance(data_batch, Mapping):
        return
    for image, sample in zip(data_batch.get('inputs', ()), data_batch.get('data_samples', ()), strict=False):
        found = len(image) if isinstance(image, Tensor) and image.dim() == 3 else 1
        if found != expected and 1 not in (found, expected):
            raise AnnotationError(
                f'{path_in(sample)}: {found} bands, model.data_preprocessor.mean has {expected} numbers; '
                f'{KINDS["bands-differ"].remedy}'
            )


def path_in(sample: Any) -> str:
    """Path of a data sample's image."""
    return str(getattr(sample, 'metainfo', {}).get('img_path', 'an image without path'))


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
                    f'{path_in(sample)}: label '
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
