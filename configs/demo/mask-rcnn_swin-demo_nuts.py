"""mask-rcnn_vheat-demo_nuts.py with Swin in place of vHeat."""

_base_ = ['./mask-rcnn_vheat-demo_nuts.py', '../_base_/swin-demo.py']
model = dict(backbone=dict(_delete_=True, **_base_.swin))
