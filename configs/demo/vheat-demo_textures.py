"""A vHeat classifier that trains from scratch in a minute on two CPU cores (`make demo-cls`)."""

_base_ = '../classification/vheat-t_16xb128_in1k.py'

data_root = '{{$VHEAT_DEMO_DATA:demo_out/data}}/textures'
classes = ('brick', 'grass', 'gravel')
metainfo = dict(classes=classes, palette=[(190, 80, 60), (70, 160, 70), (120, 120, 150)])

model = dict(
    backbone=dict(
        _delete_=True,
        type='VHeat',
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1), post_norm=False, layer_scale=None),
        img_size=256,
        out_indices=(3,),
    ),
    head=dict(in_channels=256, num_classes=len(classes)),
    train_cfg=None,
)
data_preprocessor = dict(num_classes=len(classes))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 256)),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 256)),
    dict(type='PackInputs'),
]
dataset = dict(_delete_=True, type='CustomDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_prefix='train', pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_prefix='val', pipeline=test_pipeline, **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator

max_epochs = 12
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
custom_hooks = []  # a moving average over ten thousand iterations would still hold the random start
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_epochs))
log_processor = dict(window_size=10)
randomness = dict(seed=0)
