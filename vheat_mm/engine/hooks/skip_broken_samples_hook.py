"""Replace samples that cannot be loaded, so that one bad file does not end a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader

from vheat_mm.engine.hooks.annotation_check_hook import (
    Head,
    check_bands,
    check_batch,
    class_heads,
    count_bands,
    read_labels,
)
from vheat_mm.engine.runner.data_loading import Ledger, NamingFetch, SkippingFetch, set_fetch, train_loader
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import AnnotationError, BrokenSampleError


@HOOKS.register_module()
class SkipBrokenSamplesHook(Hook):
    """Leave out samples that cannot be loaded, or that do not fit the model, with a line in the log.

    Another sample, drawn at random, takes its place, so that batches keep their size. Without this hook, one corrupt
    file or one label out of range ends the run at the iteration that draws it. In validation and testing no sample is
    replaced: the first one that cannot be loaded ends the run, and the message names it.

    Args:
        tries: Failures in a row that end the run: the cause is then the storage or the config, not a single sample.
        max_share: Share of the different samples left out that ends the run. It is taken of those drawn so far or,
            before these are 100, of the whole data set. Three are always allowed.

    Raises:
        ValueError: ``tries`` is no positive number, or ``max_share`` not between 0 and 1.
        BrokenSampleError: ``tries`` samples in a row have failed, or more than ``max_share`` of all.
    """

    def __init__(self, tries: int = 10, max_share: float = 0.1) -> None:
        if not isinstance(tries, int) or tries < 1:
            raise ValueError(f'SkipBrokenSamplesHook: tries={tries!r}, expected a positive number')
        if not isinstance(max_share, int | float) or not 0 <= max_share <= 1:
            raise ValueError(f'SkipBrokenSamplesHook: max_share={max_share!r}, expected a number from 0 to 1')
        self.tries, self.max_share = tries, max_share
        self._ledger: Ledger | None = None

    def before_train(self, runner: Runner) -> None:
        """Let the training loader replace samples."""
        loader, check = train_loader(runner), _check_for(runner)
        if not hasattr(loader.dataset, '__len__'):
            runner.logger.warning('SkipBrokenSamplesHook is inactive: the training set is not indexed by sample')
            return
        self._ledger = ledger = Ledger(len(loader.dataset), self.max_share)
        set_fetch(loader, lambda _: SkippingFetch(loader.dataset, check, self.tries, ledger))

    def after_train_epoch(self, runner: Runner) -> None:
        """Say how many samples were left out, in all processes together."""
        if self._ledger is None:
            return
        all_reduce(self._ledger.marks, op='max')
        if summary := self._ledger.summary():
            if self._ledger.is_full():
                raise BrokenSampleError(f'{summary}, more than max_share={self.max_share}; the log names each of them')
            runner.logger.warning(summary)

    def before_val(self, runner: Runner) -> None:
        """Let the validation loader name a sample that cannot be loaded."""
        _name_samples(runner.val_dataloader, runner)

    def before_test(self, runner: Runner) -> None:
        """Let the test loader name a sample that cannot be loaded."""
        _name_samples(runner.test_dataloader, runner)


def _name_samples(loader: DataLoader, runner: Runner) -> None:
    if not isinstance(getattr(loader.dataset, '__getitems__', None), NamingFetch):
        check = _check_for(runner)
        set_fetch(loader, lambda _: NamingFetch(loader.dataset, check))


def _check_for(runner: Runner) -> Callable[[Any], None]:
    model = unwrap(runner.model)
    return partial(check_sample, class_heads(model), count_bands(model))


def check_sample(heads: dict[str, Head], bands: int, sample: Any) -> None:
    """Check a loaded sample's labels and the number of bands of its image.

    Raises:
        AnnotationError: A label lies outside of what its head knows; the label map has another size than the image; the
            image has another number of bands than the mean.
    """
    data_sample = sample.get('data_samples') if isinstance(sample, Mapping) else None
    if data_sample is not None:
        image = sample.get('inputs')
        check_bands(dict(inputs=[image], data_samples=[data_sample]), bands)
        check_batch(dict(data_samples=[data_sample]), heads)
        check_map_size(image, data_sample)


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
