"""`_base_.vheat`: vHeat-T for dense prediction. Drop path and, where a head reads fewer maps, outputs go beside it."""

vheat = dict(
    type='VHeat',
    arch='tiny',
    img_size=512,  # grid of the frequency value embeddings; images may have any size
    init_cfg=dict(type='Pretrained', checkpoint='vheat_tiny'),
)
