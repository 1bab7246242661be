_base_ = [
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py',
    '../_base_/vheat-t.py',
    '../_base_/adamw_160k_ade20k.py',
]
default_hooks = _base_.vheat_hooks
model = dict(
    pretrained=None,
    # Strides 4, 16 and 32; nothing reads stride 8.
    backbone=dict(_delete_=True, drop_path_rate=0.3, out_indices=(0, 2, 3), **_base_.vheat),
    # The head's dilations (12, 24, 36) are for stride 8; a quarter of them looks as far in the image at vHeat's 32.
    decode_head=dict(in_channels=768, in_index=2, c1_in_channels=96, dilations=(1, 3, 6, 9)),
    auxiliary_head=dict(in_channels=384, in_index=1),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.schedule_160k
auto_scale_lr = dict(enable=False, base_batch_size=16)
