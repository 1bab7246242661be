_base_ = './mask-rcnn_vheat-t_fpn_ms-crop-3x_coco.py'
model = dict(
    backbone=dict(arch='small', img_size=512, drop_path_rate=0.4, init_cfg=dict(checkpoint='vheat_small')),
)
