_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', '../_base_/vheat-t.py']
default_hooks = _base_.vheat_hooks
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.1, out_indices=(1, 2, 3), **_base_.vheat),
    neck=dict(in_channels=[192, 384, 768]),
)
