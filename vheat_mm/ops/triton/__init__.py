"""Triton kernels for NVIDIA GPUs; importing this package registers them, and needs the package ``triton``.

``heat``    heat conduction, alone or with norm and gate, and its gradients
``norms``   residual sums with LayerNorm, and their gradients
``decay``   decay maps, and their gradients
``cosine``  the transforms that ``heat`` consists of
``tiles``   sizes of the tiles that programs work on, chosen from the sizes of the problem alone
``common``  what they share

Every op is a custom op of PyTorch's dispatcher with its gradients, so that eager mode, ``torch.compile`` and CUDA
graphs run the same kernels. Kernels are never timed against each other at run time, never wait for the GPU and read
sizes on the host only, so that a CUDA graph can capture them. As with any capture, one call of the same sizes comes
first: it compiles the kernels and caches the cosine bases. Without a GPU, ``TRITON_INTERPRET=1`` runs everything here
on the CPU, slowly.
"""

from vheat_mm.ops.triton import decay, heat, norms

__all__ = ['decay', 'heat', 'norms']
