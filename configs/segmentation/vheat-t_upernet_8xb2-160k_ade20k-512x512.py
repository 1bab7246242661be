_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['vheat_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='VHeat',
        arch='tiny',
        img_size=512,
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/vheat_tiny_512.pth'),
    ),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=dict(norm=dict(decay_mult=0.0))))
auto_scale_lr = dict(enable=False, base_batch_size=16)
