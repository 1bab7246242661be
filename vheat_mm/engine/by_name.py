"""Configs and models of this package by name in OpenMMLab's libraries.

Importing this module makes MMEngine take ``_base_ = 'vheat_mm::detection/...'`` and ``mmengine.hub``'s
``'vheat_mm::...'``, and the libraries' inferencers and MMPreTrain's model list take the names of our configs.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmengine.hub
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import load
from mmengine.hub import hub
from mmengine.infer import BaseInferencer
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from vheat_mm.checkpoint.released import RELEASES, Released, find_released
from vheat_mm.utils.config_place import did_you_mean
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.when_imported import when_imported

PREFIX = 'vheat_mm::'  # of names of our configs
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = dict(mmpretrain='classification', mmdet='detection', mmseg='segmentation')  # library -> folder of configs/


def _root() -> Path:
    """The folder of configs/ and model-index.yml: OpenMMLab's ``.mim``, or a clone that was not installed."""
    mim = _PACKAGE / '.mim'
    return mim if (mim / 'configs').is_dir() else _PACKAGE.parent


def config_path(name: str) -> str:
    """Absolute path of a config of this package.

    ``_base_ = __import__('vheat_mm').config_path('detection/...py')`` works in configs that are read by programs which
    do not import this package; elsewhere ``_base_ = 'vheat_mm::detection/...py'`` is shorter.

    Args:
        name: Path below ``configs/``.

    Raises:
        FileNotFoundError: There is no such config.
    """
    folder = _root() / 'configs'
    path = folder / name
    if path.suffix == '.py' and path.is_file():
        return str(path)
    known, same = _configs(), find_config(path.stem)
    hint = f', did you mean {same!r}?' if same else did_you_mean(name, known)
    if not known:
        hint = '; the package was installed without its configs, install it again: pip install vheat_mm'
    raise FileNotFoundError(f'vheat_mm has no config {name!r} below {str(folder)!r}{hint}')


def find_config(stem: str) -> str | None:
    """Path below ``configs/`` of this package's config with a file name, given without ``.py``."""
    return next((file for file in _configs() if Path(file).stem == stem), None)


def _configs() -> list[str]:
    folder = _root() / 'configs'
    return sorted(file.relative_to(folder).as_posix() for file in folder.glob('[!_]*/*.py'))


def dataset_meta(release: Released) -> dict[str, Any] | None:
    """Names and colours of the classes, by the config's data set; ``None`` where its library is not imported."""
    library = dict(vheatdet='mmdet', vheatseg='mmseg').get(release.path.split('/')[0])
    if library not in sys.modules:
        return None
    cfg = Config.fromfile(config_path(f'{_FOLDERS[library]}/{release.config}.py'))
    return DATASETS.get(f'{library}.{cfg.test_dataloader.dataset.type}').METAINFO


MODULE2PACKAGE['vheat_mm'] = 'vheat_mm'

_get_cfg_path, _get_config = Config._get_cfg_path, hub.get_config
_get_models, _load_model = BaseInferencer._get_models_from_metafile, BaseInferencer._load_model_from_metafile


def _find_base(cfg_path: str, filename: str) -> tuple[str, str | None]:
    """MMEngine marks what comes from ``mmdet::`` for mmdet's registry. Our configs are for that of their library."""
    if cfg_path.startswith(PREFIX):
        return config_path(cfg_path.removeprefix(PREFIX)), None
    try:
        return _get_cfg_path(cfg_path, filename)
    except ModuleNotFoundError as error:
        if error.name != 'pkg_resources':
            raise
        text = f"MMEngine needs pkg_resources, up to setuptools 80, to find {cfg_path!r}: pip install 'setuptools<81'"
        raise ImportError(text) from None


@functools.wraps(_get_config)
def _get_config_or_ours(cfg_path: str, pretrained: bool = False) -> Config:
    if not cfg_path.startswith(PREFIX):
        return _get_config(cfg_path, pretrained)
    path = config_path(cfg_path.removeprefix(PREFIX))
    cfg = Config.fromfile(path)
    if pretrained:
        release = find_released(Path(path).stem)
        if release is None:
            names = ', '.join(release.config for release in RELEASES)
            raise CheckpointError(f'no weights are published for {cfg_path!r}; those of others are: {names}')
        cfg.model_path = release.url
    return cfg


def _list_with_ours(dir: str) -> Iterator[dict[str, Any]]:
    yield from _get_models(dir)
    for library in ('mmdet', 'mmseg'):
        if library in sys.modules and dir == BaseInferencer._get_repo_or_mim_dir(library):
            for row in load(_root() / 'configs' / _FOLDERS[library] / 'metafile.yml')['Models']:
                if 'vheat' in row['Name']:  # not what it is compared with
                    yield {'Weights': None, **row, 'Config': str(_root() / row['Config'])}


def _load_or_notify(self: BaseInferencer, model: str) -> tuple[Config, str | None]:
    cfg, weights = _load_model(self, model)
    if weights is None:
        text = f'No weights are published for {model!r}: pass weights=PATH, or its answers are random.'
        print_log(text, logger='current', level=logging.WARNING)
    return cfg, weights


def _add_to_mmpretrain() -> None:
    model_hub = importlib.import_module('mmpretrain.apis.model').ModelHub
    root, known = _root(), set(model_hub._models_dict)
    model_hub.register_model_index(root / 'configs' / _FOLDERS['mmpretrain'] / 'metafile.yml', config_prefix=root)
    for name in {name for name in model_hub._models_dict if 'vheat' not in name} - known:
        del model_hub._models_dict[name]  # what vHeat is compared with


Config._get_cfg_path = staticmethod(_find_base)
BaseInferencer._get_models_from_metafile = staticmethod(_list_with_ours)
BaseInferencer._load_model_from_metafile = _load_or_notify
mmengine.hub.get_config = hub.get_config = _get_config_or_ours
when_imported('mmpretrain.apis.model', _add_to_mmpretrain)
