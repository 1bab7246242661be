"""torchvision beside a PyTorch build that its compiled operators do not match."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_torchvision_schemas = None  # keeps the declared schemas alive for the life of the process


def ensure_torchvision() -> ModuleType | None:
    """Import torchvision, also where its compiled operators do not match this PyTorch build.

    mmpretrain imports torchvision for its Python parts only. A torchvision built for CUDA fails to import beside a
    CPU-only PyTorch with "operator torchvision::nms does not exist"; declaring the two missing schemas is enough
    for everything mmpretrain uses. A matching torchvision is left untouched.

    Returns:
        The torchvision module, or ``None`` where it is not installed.
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
