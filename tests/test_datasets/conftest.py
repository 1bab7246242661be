"""Data sets with one fault per file, written once a session."""

from __future__ import annotations

from pathlib import Path

import corrupt_data
import pytest

from vheat_mm.utils.torchvision import ensure_torchvision

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
def _own_scope(own_scope):
    """Each check sets a default scope."""
