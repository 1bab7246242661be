"""vHeat for OpenMMLab: the heat conduction backbone under any MMEngine config.

Importing registers: ``VHeat`` and the release's spellings as models, this package's hooks, optimizer constructor and
test-time augmentation, and the classes named in :mod:`vheat_mm.compat` with PyTorch's safe loader. Nothing else
happens, and only torch and mmengine are needed.
"""

from . import hooks as hooks
from . import layer_decay as layer_decay
from . import release as release
from . import tta as tta
from .compat import register_safe_globals
from .version import __version__
from .vheat import VHeat
from .zoo import create_model, list_models

register_safe_globals()

__all__ = ['VHeat', '__version__', 'create_model', 'list_models']
