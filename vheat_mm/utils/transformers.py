"""transformers that is too new for mmpretrain."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.utils import digit_version

from vheat_mm.utils.text import summarize_error
from vheat_mm.utils.when_imported import when_imported

# What mmpretrain's language models import; transformers 4.55 and 5 moved or removed them.
_NEEDED = ('apply_chunking_to_forward', 'find_pruneable_heads_and_indices', 'prune_linear_layer')


def multimodal_fault() -> tuple[str, str] | None:
    """Why the multi-modal models of the installed mmpretrain cannot be imported, and the pip requirement that helps.

    Returns:
        ``None`` if they can, as far as transformers is concerned.

    Raises:
        ModuleNotFoundError: mmpretrain is not installed.
    """
    version = importlib.import_module('mmpretrain.version').__version__
    forked = digit_version(version) >= digit_version('1.3')  # onedl-mmpretrain took the new place of these names
    try:
        place = importlib.import_module(f'transformers.{"pytorch_utils" if forked else "modeling_utils"}')
    except Exception as error:  # transformers imports torchvision and others, which may be broken
        reason = f'transformers does not import ({summarize_error(error)})'
    else:
        missing = [name for name in _NEEDED if not hasattr(place, name)]
        if not missing:
            return None
        found = importlib.import_module('transformers').__version__
        reason = f'transformers {found} is too new: {place.__name__} has no {missing[0]}'
    return f'mmpretrain {version} cannot use its multi-modal models: {reason}', f'transformers<{5 if forked else 4.55}'


def mend_mmpretrain() -> None:
    """Switch mmpretrain's multi-modal models off, as soon as it is imported, where transformers is too new for them.

    Otherwise ``import mmpretrain.models``, and ``import mmdet.models`` with it, ends with "NoneType takes no
    arguments". Where mmpretrain tried to import them before this call, nothing can be done.
    """
    when_imported('mmpretrain.utils.dependency', _switch_off)


def _switch_off() -> None:
    dependency: Any = importlib.import_module('mmpretrain.utils.dependency')
    if dependency.WITH_MULTIMODAL and (fault := multimodal_fault()):
        dependency.WITH_MULTIMODAL = False
        print_log(f"{fault[0]}; they are switched off (pip install '{fault[1]}' for them)", 'current', logging.INFO)
