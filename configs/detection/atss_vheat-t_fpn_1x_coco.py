_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py', '../_base_/vheat-t.py', '../_base_/adamw_1x_coco.py']
default_hooks = _base_.vheat_hooks
model = dict(
    # The head starts at stride 8; an output norm that nothing reads would stop distributed training.
    backbone=dict(_delete_=True, drop_path_rate=0.1, out_indices=(1, 2, 3), **_base_.vheat),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.schedule_1x
