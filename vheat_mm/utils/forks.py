"""Maintained forks of OpenMMLab's packages, whose import names are the same."""

from __future__ import annotations

import contextlib
import importlib.metadata

from mmengine.config.utils import MODULE2PACKAGE


def name_forks() -> None:
    """Tell MMEngine the distribution of mmseg where that is onedl-mmsegmentation.

    MMEngine looks for ``mmsegmentation`` to read a config as ``mmseg::``; other libraries it also finds by their import
    name.
    """
    for name in ('mmsegmentation', 'onedl-mmsegmentation'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(name)
            MODULE2PACKAGE['mmseg'] = name
            return
