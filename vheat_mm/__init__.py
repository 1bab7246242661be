"""vHeat for OpenMMLab: the heat conduction backbone under any MMEngine config.

Importing registers the models, hooks, optimizer wrappers and test-time augmentation of this package with MMEngine,
the classes of :mod:`vheat_mm.checkpoint.safe_globals` with PyTorch's safe loader, and the published models with timm
where that is imported, before or after. It needs torch and mmengine only.
"""

import importlib

from vheat_mm import engine as engine
from vheat_mm import models as models
from vheat_mm.apis.model_zoo import create_model, list_models
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.engine.by_name import config_path
from vheat_mm.models.vheat import VHeat
from vheat_mm.utils.forks import name_forks
from vheat_mm.utils.transformers import mend_mmpretrain
from vheat_mm.utils.when_imported import when_imported
from vheat_mm.version import __version__

register_safe_globals()
mend_mmpretrain()
name_forks()
when_imported('timm', lambda: importlib.import_module('vheat_mm.apis.timm.vheat'))

__all__ = ['VHeat', '__version__', 'config_path', 'create_model', 'list_models']
