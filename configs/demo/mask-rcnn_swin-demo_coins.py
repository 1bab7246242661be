"""The demo with Swin in place of vHeat: same widths and depths, heads, schedule and seed."""

_base_ = ['./mask-rcnn_vheat-demo_coins.py', '../_base_/swin-demo.py']
model = dict(backbone=dict(_delete_=True, **_base_.swin))
