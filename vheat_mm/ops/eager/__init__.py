"""Kernels in plain PyTorch and oneDNN: for CPUs, and for training on any device. Importing registers them."""

from vheat_mm.ops.eager import decay, freq_embed, heat, linear, mlp, norm_gate, stem

__all__ = ['decay', 'freq_embed', 'heat', 'linear', 'mlp', 'norm_gate', 'stem']
