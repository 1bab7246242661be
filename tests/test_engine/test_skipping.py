"""Samples that cannot be loaded: left out in training up to a share of all, named in validation."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import ImgDataPreprocessor
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vheat_mm.engine.hooks import SkipBrokenSamplesHook
from vheat_mm.engine.hooks.skip_broken_samples_hook import _check_for
from vheat_mm.engine.runner.data_loading import Ledger, NamingFetch, SkippingFetch, set_fetch
from vheat_mm.utils.errors import AnnotationError, BrokenSampleError


class Numbers(Dataset):
    """Numbers, of which those in ``broken`` raise an error."""

    def __init__(self, length: int, broken: dict[int, Exception]):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise self.broken[index]
        return index

    def get_data_info(self, index):
        return dict(img_path=f'pictures/{index}.jpg')


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def epoch(data: Numbers, ledger: Ledger, workers: int = 0) -> list[int]:
    MMLogger.get_instance('skipping')
    loader = DataLoader(data, batch_size=4, num_workers=workers)
    set_fetch(loader, lambda _: SkippingFetch(data, lambda _: None, 10, ledger))
    return torch.cat(list(loader)).tolist()


@pytest.mark.parametrize('workers', [0, 3])
def test_counts_of_all_workers(workers):
    data = Numbers(200, {3: FileNotFoundError('gone'), 77: AnnotationError('label 9'), 150: ValueError('bad')})
    ledger = Ledger(len(data), max_share=0.1)
    drawn = epoch(data, ledger, workers)
    assert len(drawn) == 200
    assert not {3, 77, 150} & set(drawn)
    text = '3 of 200 samples were left out: 1 could not be read, 1 do not fit the model, 1 could not'
    assert ledger.summary().startswith(text)
    assert epoch(data, ledger, workers)  # a second time, they count once
    ledger.add(3, None)  # readable again
    assert ledger.summary().startswith(text)


@pytest.mark.parametrize('workers', [0, 3])
def test_too_many(workers):
    """56 of 64 used to leave a training on 8 images, with status 0."""
    data = Numbers(64, {index: OSError('gone') for index in range(8, 64)})
    with pytest.raises(BrokenSampleError, match=r'\d+ of \d+ samples were left out: \d+ could not be read. The first'):
        epoch(data, Ledger(64, max_share=0.1), workers)


@pytest.mark.parametrize(('length', 'broken', 'fine'), [(6, 3, True), (6, 4, False), (400, 39, True), (400, 60, False)])
def test_share(length, broken, fine):
    ledger = Ledger(length, max_share=0.1)
    step = length // broken
    for index in range(length):
        ledger.add(index, ValueError() if index % step == 0 and index // step < broken else None)
    assert ledger.is_full() is not fine


@pytest.mark.parametrize(('bands', 'fine'), [(3, True), (1, True), (4, False)])
def test_bands(bands, fine):
    """An RGBA image among RGB ones; a grey one is repeated by the subtraction of the mean."""
    sample = SimpleNamespace(metainfo=dict(img_path='x.tif'))
    model = nn.Module()
    model.data_preprocessor = ImgDataPreprocessor([0] * 3, [1] * 3)
    check = _check_for(SimpleNamespace(model=model))
    with nullcontext() if fine else pytest.raises(AnnotationError, match=r'x.tif: 4 bands, .* has 3 numbers'):
        check(dict(inputs=torch.zeros(bands, 8, 8), data_samples=sample))


def test_processes_join_their_counts(monkeypatch):
    """Each process draws a part of the samples; at the end of an epoch all know of all."""
    hook, said = SkipBrokenSamplesHook(), []
    hook._ledger, other = Ledger(90, 0.1), Ledger(90, 0.1)
    for index in range(90):
        mine = hook._ledger if index % 2 else other
        mine.add(index, ValueError() if index in (0, 1, 2, 3) else None)
    monkeypatch.setattr(
        'vheat_mm.engine.hooks.skip_broken_samples_hook.all_reduce',
        lambda marks, op: op == 'max' and marks.copy_(torch.maximum(marks, other.marks)),
    )
    runner = SimpleNamespace(logger=SimpleNamespace(warning=said.append))
    hook.after_train_epoch(runner)
    assert said == ['4 of 90 samples were left out: 4 could not be decoded or transformed']
    for index in range(4, 14):
        other.add(index, OSError())
    with pytest.raises(BrokenSampleError, match=r'14 of 90 .* 10 could not be read.*max_share=0.1'):
        hook.after_train_epoch(runner)


def test_validation_names_the_sample():
    data = Numbers(8, {5: ValueError('no image')})
    loader = DataLoader(data, batch_size=4, num_workers=1)
    set_fetch(loader, lambda _: NamingFetch(data, lambda _: None))
    with pytest.raises(BrokenSampleError, match=r'sample 5 \(pictures/5.jpg\) .*ValueError: no image'):
        list(loader)


def test_a_stream_of_samples_is_left_alone():
    said = []
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=DataLoader(Stream())),
        model=nn.Identity(),
        logger=SimpleNamespace(warning=said.append),
    )
    hook = SkipBrokenSamplesHook()
    hook.before_train(runner)
    hook.after_train_epoch(runner)
    assert ['inactive' in line for line in said] == [True]


def test_arguments():
    with pytest.raises(ValueError, match='max_share=2'):
        SkipBrokenSamplesHook(max_share=2)
    with pytest.raises(ValueError, match='tries=0'):
        SkipBrokenSamplesHook(tries=0)
