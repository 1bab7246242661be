_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', '../_base_/vheat-t.py']
custom_imports = dict(imports=['vheat_mm'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
model = dict(backbone=dict(_delete_=True, drop_path_rate=0.2, **_base_.vheat))
