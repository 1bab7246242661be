"""The demo on photographs of dates, figs and hazelnuts, split by .dev_scripts/learning_curves.py."""

_base_ = './mask-rcnn_vheat-demo_coins.py'
metainfo = dict(
    _delete_=True, classes=('date', 'fig', 'hazelnut'), palette=[(200, 90, 40), (110, 60, 160), (60, 150, 90)]
)
model = dict(roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)))
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader
# A dozen images: many rounds, and scores every tenth of them.
max_epochs = 60
train_cfg = dict(max_epochs=max_epochs, val_interval=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(interval=max_epochs))
