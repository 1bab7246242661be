"""torchvision whose compiled operators do not match the PyTorch build."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_torchvision_schemas = None  # a reference keeps the declared schemas registered


def ensure_torchvision() -> ModuleType | None:
    """Import torchvision, also where its compiled operators do not match this PyTorch build.

    mmpretrain uses only Python parts of torchvision. With a CPU-only PyTorch, importing a torchvision built for CUDA
    fails with "operator torchvision::nms does not exist"; declaring the two missing schemas is enough for all that
    mmpretrain uses. A matching torchvision is imported without changes.

    Returns:
        The torchvision module, or ``None`` if it is not installed.
    """
    global _torchvision_schemas
    try:
        return importlib.import_module('torchvision')
    except ModuleNotFoundError as error:
        if error.name == 'torchvision':
            return None
        raise
    except RuntimeError as error:
        if 'torchvision::nms does not exist' not in str(error) or _torchvision_schemas is not None:
            raise
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        del sys.modules[name]  # half-imported
    library = torch.library.Library('torchvision', 'DEF')
    library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _torchvision_schemas = library
    return importlib.import_module('torchvision')
