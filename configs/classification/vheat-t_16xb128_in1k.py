_base_ = ['mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', '../_base_/runtime.py']
default_hooks = _base_.vheat_hooks
model = dict(
    backbone=dict(_delete_=True, type='VHeat', arch='tiny', img_size=224, drop_path_rate=0.1, out_indices=(3,))
)
train_dataloader = dict(batch_size=128)
# 16 GPUs x 128 images: the recipe's rates are per 512
optim_wrapper = dict(
    optimizer=dict(lr=5e-4 * 2048 / 512, weight_decay=0.08),
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-6 * 2048 / 512, by_epoch=True, begin=20, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
