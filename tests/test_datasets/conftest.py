"""Data sets with one fault per file, written once a session, and what each test restores."""

from __future__ import annotations

import logging
from pathlib import Path

import corrupt_data
import pytest

from vheat_mm.utils.torchvision import ensure_torchvision

pytest.importorskip('mmcv')
ensure_torchvision()


@pytest.fixture(scope='session')
def coco(tmp_path_factory) -> dict[str, Path]:
    return corrupt_data.make_corrupt_coco(tmp_path_factory.mktemp('coco'))


@pytest.fixture(scope='session')
def ade(tmp_path_factory) -> dict[str, Path]:
    return corrupt_data.make_corrupt_ade(tmp_path_factory.mktemp('ade'))


@pytest.fixture(scope='session')
def folders(tmp_path_factory) -> dict[str, Path]:
    return corrupt_data.make_corrupt_folder(tmp_path_factory.mktemp('folders'))


@pytest.fixture(autouse=True)
def _restored(own_scope):
    yield
    logging.disable(logging.NOTSET)  # the tool silences the libraries
