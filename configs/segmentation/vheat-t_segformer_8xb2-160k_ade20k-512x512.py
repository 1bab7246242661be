_base_ = ['mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', '../_base_/vheat-t.py']
default_hooks = _base_.vheat_hooks
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.3, **_base_.vheat),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
