"""Replace samples that cannot be loaded, so that one bad file does not end a training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader

from vheat_mm.engine.hooks.annotation_check_hook import Head, check_batch, class_heads, read_labels
from vheat_mm.engine.runner.data_loading import SkippingFetch, set_fetch, train_loader
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import AnnotationError


@HOOKS.register_module()
class SkipBrokenSamplesHook(Hook):
    """Leave out samples that cannot be loaded, or whose labels the model cannot learn, with a line in the log.

    Another sample, drawn at random, takes its place, so that batches keep their size. Without this hook, one corrupt
    file or one label out of range ends the run at the iteration that draws it. Validation sets are treated alike: a
    metric then counts the other sample twice.

    Args:
        tries: Failures in a row that end the run: the cause is then the storage or the config, not a single sample.

    Raises:
        ValueError: ``tries`` is no positive number.
        BrokenSampleError: ``tries`` samples in a row have failed.
    """

    def __init__(self, tries: int = 10) -> None:
        if not isinstance(tries, int) or tries < 1:
            raise ValueError(f'SkipBrokenSamplesHook: tries={tries!r}, expected a positive number')
        self.tries = tries

    def before_train(self, runner: Runner) -> None:
        """Put the check into the loaders of training and validation."""
        check = partial(check_sample, class_heads(unwrap(runner.model)))

        def skip(loader: DataLoader) -> None:
            set_fetch(loader, lambda _: SkippingFetch(loader.dataset, check, self.tries))

        skip(train_loader(runner))
        if runner.val_loop is not None:
            skip(runner.val_dataloader)


def check_sample(heads: dict[str, Head], sample: Any) -> None:
    """Check a loaded sample's labels.

    Raises:
        AnnotationError: A label lies outside of what its head knows, or the label map has another size than the image.
    """
    data_sample = sample.get('data_samples') if isinstance(sample, Mapping) else None
    if data_sample is not None:
        check_batch(dict(data_samples=[data_sample]), heads)
        check_map_size(sample.get('inputs'), data_sample)


def check_map_size(image: Any, data_sample: Any) -> None:
    """Compare a label map's size with its image, as given to the model (training) or as stored (validation).

    Raises:
        AnnotationError: It has neither size; a metric fails on that.
    """
    labels, meta = read_labels(data_sample, 'gt_sem_seg'), getattr(data_sample, 'metainfo', {})
    if labels is None or not isinstance(image, Tensor):
        return
    sizes = [tuple(image.shape[-2:]), *([tuple(meta['ori_shape'][:2])] if 'ori_shape' in meta else [])]
    if tuple(labels.shape[-2:]) not in sizes:
        raise AnnotationError(
            f'{meta.get("seg_map_path") or meta.get("img_path")}: the label map is {tuple(labels.shape[-2:])} (height, '
            f'width), and its image {sizes[-1]}; write it again at the size of the image'
        )
