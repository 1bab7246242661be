_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', '../_base_/vheat-t.py']
default_hooks = _base_.vheat_hooks
# img_size: the released checkpoint has the grid of 224 pixels, all others that of 512
model = dict(backbone=dict(_base_.vheat, _delete_=True, drop_path_rate=0.2, img_size=224))
