"""`_base_.swin`: Swin with the widths and depths of the demo's vHeat."""

swin = dict(type='SwinTransformer', embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.0)
