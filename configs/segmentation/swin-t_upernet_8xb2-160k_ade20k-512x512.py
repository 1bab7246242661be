_base_ = ['mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py', '../_base_/runtime.py']
default_hooks = _base_.vheat_hooks
model = dict(test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))  # as ours; mmseg tests whole images
auto_scale_lr = dict(enable=False, base_batch_size=16)
