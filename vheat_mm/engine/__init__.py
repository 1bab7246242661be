"""What works with an MMEngine ``Runner``: hooks, optimizers, data loading, processes, files.

``strategies`` is not imported here, as it needs PyTorch's FSDP: ``custom_imports`` names ``vheat_mm.fsdp``.
"""

from vheat_mm.engine import hooks as hooks
from vheat_mm.engine import optimizers as optimizers
