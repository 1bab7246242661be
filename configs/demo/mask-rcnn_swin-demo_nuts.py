"""mask-rcnn_vheat-demo_nuts.py with Swin in place of vHeat."""

_base_ = './mask-rcnn_vheat-demo_nuts.py'
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
