"""What works with an MMEngine ``Runner``: hooks, optimizers, strategies, data loading, processes, files.

``strategies`` needs PyTorch's FSDP, so it is not imported here; configs import ``vheat_mm.fsdp``.
"""

from vheat_mm.engine import by_name as by_name
from vheat_mm.engine import hooks as hooks
from vheat_mm.engine import optimizers as optimizers
