"""The operators of vHeat on tensors: reference mathematics, and backends for CPUs and GPUs.

``from vheat_mm import ops``, then for instance ``ops.heat_conduction(x, decay)``; see :mod:`vheat_mm.ops.reference`.
"""

from vheat_mm.ops import eager as eager  # registers the kernels for CPUs
from vheat_mm.ops.backends import use_backend
from vheat_mm.ops.chunks import apply_to_images, apply_to_rows
from vheat_mm.ops.dct import dct_matrix
from vheat_mm.ops.reference import (
    add_norm,
    convolve,
    decay_map,
    decay_maps,
    embed_patches,
    fit_freq_embed,
    heat_conduction,
    heat_norm_gate_,
    linear,
    mlp,
    norm_add,
    norm_gate,
    split_linear,
)
from vheat_mm.ops.registry import get_backend

__all__ = [
    'add_norm',
    'apply_to_images',
    'apply_to_rows',
    'convolve',
    'dct_matrix',
    'decay_map',
    'decay_maps',
    'embed_patches',
    'fit_freq_embed',
    'get_backend',
    'heat_conduction',
    'heat_norm_gate_',
    'linear',
    'mlp',
    'norm_add',
    'norm_gate',
    'split_linear',
    'use_backend',
]
