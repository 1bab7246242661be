"""Mask2Former on vHeat-T: `_base_.backbone`, `_base_.channels` and `_base_.backbone_rates` for its three tasks.

The norms learn at a tenth of the rate and without decay, as Mask2Former has it for Swin. The key 'backbone' of
Mask2Former's optimizer decides about decay; only longer keys come before it, so all are named.
"""

_base_ = './vheat-t_backbone.py'
backbone = dict(_delete_=True, drop_path_rate=0.3, **_base_.vheat)
channels = [96, 192, 384, 768]
depths = (2, 2, 6, 2)
backbone_rates = dict(
    paramwise_cfg=dict(
        custom_keys={
            f'backbone.{name}': dict(lr_mult=0.1, decay_mult=0.0)
            for name in (
                'patch_embed.norm',
                'outnorm',
                *(f'layers.{i}.{j}.norm' for i, depth in enumerate(depths) for j in range(depth)),
                *(f'layers.{i}.{j}.op.out_norm' for i, depth in enumerate(depths) for j in range(depth)),
                *(f'layers.{i}.{depth}.1' for i, depth in enumerate(depths[:3])),  # of the downsampling
            )
        }
    )
)
