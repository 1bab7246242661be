"""One bad image or annotation never ends a training."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from vheat_mm.engine.hooks.annotation_check_hook import check_batch, class_heads, read_labels
from vheat_mm.engine.runner.data_loading import SkippingFetch, set_fetch, train_loader
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import AnnotationError


@HOOKS.register_module()
class SkipBrokenSamplesHook(Hook):
    """Leave out samples that cannot be loaded, or whose labels the model cannot learn, with a line in the log.

    Another sample of the set, drawn at random, takes the place, so that batches keep their size. Without this hook,
    one file that has gone bad, or one label out of range, ends the run at the iteration that draws it. Validation
    sets are treated alike: a metric then counts the other sample twice, and the log says so.

    Args:
        tries: Failures in a row that end the run: then it is the storage, or the config, and no single sample.

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
        check = LabelCheck(class_heads(unwrap(runner.model)))
        loader = train_loader(runner)
        set_fetch(loader, lambda _: SkippingFetch(loader.dataset, check, self.tries))
        if runner.val_loop is not None:
            validation = runner.val_dataloader
            set_fetch(validation, lambda _: SkippingFetch(validation.dataset, check, self.tries))


class LabelCheck:
    """Refuses a loaded sample whose labels lie outside what a head knows.

    Args:
        heads: What :func:`~vheat_mm.engine.hooks.annotation_check_hook.class_heads` found. Only numbers are kept, as workers get
            a copy.
    """

    def __init__(self, heads: dict[str, tuple[str, Any]]) -> None:
        self._heads = {
            kind: (
                name,
                SimpleNamespace(num_classes=head.num_classes, ignore_index=getattr(head, 'ignore_index', 255)),
            )
            for kind, (name, head) in heads.items()
        }

    def __call__(self, sample: Any) -> None:
        """Raises :class:`~vheat_mm.utils.errors.AnnotationError` for such a sample."""
        data_sample = sample.get('data_samples') if isinstance(sample, Mapping) else None
        if data_sample is not None:
            check_batch(dict(data_samples=[data_sample]), self._heads)
            check_map_size(sample.get('inputs'), data_sample)


def check_map_size(image: Any, data_sample: Any) -> None:
    """A label map is as large as its image: as given to the model (training), or as it was in the file (validation).

    Raises:
        AnnotationError: It is neither; a metric ends the run on that.
    """
    labels, meta = read_labels(data_sample, 'gt_sem_seg'), getattr(data_sample, 'metainfo', {})
    if labels is None or not isinstance(image, Tensor):
        return
    sizes = [tuple(image.shape[-2:]), *([tuple(meta['ori_shape'][:2])] if 'ori_shape' in meta else [])]
    if tuple(labels.shape[-2:]) not in sizes:
        raise AnnotationError(
            f'{meta.get("seg_map_path") or meta.get("img_path")}: the label map is {tuple(labels.shape[-2:])} (height, '
            f'width), and its image {sizes[-1]}; write the map anew at the size of the image'
        )
