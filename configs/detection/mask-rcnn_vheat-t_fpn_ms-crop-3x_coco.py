_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
custom_imports = dict(imports=['vheat_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='VHeat',
        arch='tiny',
        img_size=512,
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/vheat_tiny_512.pth'),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=dict(norm=dict(decay_mult=0.0))))
