_base_ = [
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    '../_base_/vheat-t.py',
    '../_base_/adamw_160k_ade20k.py',
]
default_hooks = _base_.vheat_hooks
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, drop_path_rate=0.3, **_base_.vheat),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.schedule_160k
auto_scale_lr = dict(enable=False, base_batch_size=16)
