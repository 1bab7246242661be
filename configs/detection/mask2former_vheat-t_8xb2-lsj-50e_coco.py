_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    '../_base_/vheat-t.py',
    '../_base_/mask2former_vheat-t_norms.py',
]
custom_imports = dict(imports=['vheat_mm'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.3, **_base_.vheat),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.backbone_norms))
