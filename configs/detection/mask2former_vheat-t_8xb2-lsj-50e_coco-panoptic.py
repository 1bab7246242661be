_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    '../_base_/runtime.py',
    '../_base_/mask2former_vheat-t.py',
]
default_hooks = _base_.vheat_hooks
model = dict(backbone=_base_.backbone, panoptic_head=dict(in_channels=_base_.channels))
optim_wrapper = _base_.backbone_rates
