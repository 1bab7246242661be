"""A vHeat UPerNet that trains from scratch in minutes on two CPU cores (`make demo-seg`)."""

_base_ = '../segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py'

data_root = '{{$VHEAT_DEMO_DATA:demo_out/data}}/ade'
metainfo = dict(
    classes=('brick', 'grass', 'gravel', 'coin'),
    palette=[[190, 80, 60], [70, 160, 70], [120, 120, 150], [250, 180, 30]],
)
crop_size = (256, 256)

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        _delete_=True,
        type='VHeat',
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1), post_norm=False, layer_scale=None),
        img_size=256,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, num_classes=4),
    auxiliary_head=dict(in_channels=128, channels=64, num_classes=4),
    # The images are as large as the crops: nothing to slide over.
    test_cfg=dict(_delete_=True, mode='whole'),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=crop_size, ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=crop_size, keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
# ADE20KDataset knows ADE20K's 150 names only; its base class takes any in the same layout.
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    metainfo=metainfo,
    data_root=data_root,
    reduce_zero_label=True,
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader

max_iters = 500
train_cfg = dict(max_iters=max_iters, val_interval=100)
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=dict(max_norm=1))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=40),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=40, end=max_iters, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters))
log_processor = dict(window_size=10)
randomness = dict(seed=0)
