"""The demo with Swin in place of vHeat: same widths and depths, heads, schedule and seed."""

_base_ = './mask-rcnn_vheat-demo_coins.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=32,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        drop_path_rate=0.0,
    )
)
