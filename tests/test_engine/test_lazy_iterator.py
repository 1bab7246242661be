"""The iterator that stands in for that of MMEngine's iteration-based loop."""

import itertools

from torch.utils.data import DataLoader

from vheat_mm.engine.runner.data_loading import LazyIterator


def test_batches_after_those_that_a_resumed_loop_drops():
    """MMEngine asks for the batches before its place, and onedl-mmengine calls ``skip_iter`` for them."""
    loader = DataLoader([1, 2, 3], collate_fn=lambda batch: batch[0])
    assert list(itertools.islice(LazyIterator(loader, skip=2), 5)) == [None, None, 1, 2, 3]
    batches = LazyIterator(loader)
    batches.skip_iter(2)
    assert list(itertools.islice(batches, 3)) == [1, 2, 3]
