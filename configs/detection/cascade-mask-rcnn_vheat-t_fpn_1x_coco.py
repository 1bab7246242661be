_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/vheat-t.py',
    '../_base_/adamw_1x_coco.py',
]
default_hooks = _base_.vheat_hooks
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.1, **_base_.vheat),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.schedule_1x
