"""Forks of OpenMMLab's packages, by their distributions; .dev_scripts/check_onedl.sh tests with the forks."""

import importlib.metadata

import pytest
from mmengine.config.utils import MODULE2PACKAGE

from vheat_mm.utils.forks import name_forks


@pytest.mark.parametrize(
    ('installed', 'name'),
    [
        ({'onedl-mmsegmentation'}, 'onedl-mmsegmentation'),
        ({'mmsegmentation', 'onedl-mmsegmentation'}, 'mmsegmentation'),
        (set(), 'as before'),
    ],
)
def test_mmengine_knows_the_distribution_of_mmseg(monkeypatch, installed, name):
    def distribution(name: str) -> None:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'distribution', distribution)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'as before')
    name_forks()
    assert MODULE2PACKAGE['mmseg'] == name
