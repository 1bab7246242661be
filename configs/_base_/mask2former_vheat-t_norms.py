"""`_base_.backbone_norms`: vHeat-T's norms at a tenth of the rate and without decay, as Mask2Former has it for Swin.

The key 'backbone' of Mask2Former's optimizer decides about decay; only longer keys come before it, so all are named.
"""

depths = (2, 2, 6, 2)
backbone_norms = {
    f'backbone.{name}': dict(lr_mult=0.1, decay_mult=0.0)
    for name in (
        'patch_embed.norm',
        'outnorm',
        *(f'layers.{i}.{j}.norm' for i, depth in enumerate(depths) for j in range(depth)),
        *(f'layers.{i}.{j}.op.out_norm' for i, depth in enumerate(depths) for j in range(depth)),
        *(f'layers.{i}.{depth}.1' for i, depth in enumerate(depths[:3])),  # of the downsampling
    )
}
