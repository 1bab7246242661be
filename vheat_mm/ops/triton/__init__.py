"""Triton kernels for the network's steps on NVIDIA GPUs; importing this package needs the package ``triton``.

``heat``       heat conduction, alone or with norm and gate, and its gradients
``norm``       residual sums with LayerNorm, and their gradients
``decay``      decay maps, and their gradients
``cosine``     the transforms that ``heat`` consists of
``transform``  their kernels; ``norm_gate`` and ``residual`` hold those of norms
``tiles``      sizes of the tiles that programs work on, chosen from the problem's sizes alone
``common``     what they share

Kernels are never timed against each other at run time, never wait for the GPU and read sizes on the host only, so that
a CUDA graph can capture them. As with any capture, one call of the same sizes comes first: it compiles the kernels and
caches the cosine bases. Without a GPU, ``TRITON_INTERPRET=1`` runs everything here on the CPU, slowly.
"""

from vheat_mm.ops.triton.decay import decay_map, takes_decay_map
from vheat_mm.ops.triton.heat import heat_conduction, heat_norm_gate, takes_heat_conduction, takes_heat_norm_gate
from vheat_mm.ops.triton.norm import add_norm, norm_add, takes_add_norm, takes_norm_add

__all__ = [
    'add_norm',
    'decay_map',
    'heat_conduction',
    'heat_norm_gate',
    'norm_add',
    'takes_add_norm',
    'takes_decay_map',
    'takes_heat_conduction',
    'takes_heat_norm_gate',
    'takes_norm_add',
]
