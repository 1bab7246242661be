_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/vheat-t.py']
default_hooks = _base_.vheat_hooks
model = dict(backbone=dict(_delete_=True, drop_path_rate=0.1, **_base_.vheat))
