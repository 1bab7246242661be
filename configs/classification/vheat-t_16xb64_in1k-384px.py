_base_ = './vheat-t_16xb128_in1k.py'
model = dict(backbone=dict(img_size=384, drop_path_rate=0.1))
load_from = 'vheat_tiny'  # the released classifier of 224 pixels; its frequency value embeddings grow when loaded

# Swin's recipe for larger images: augmentation as before, 30 epochs of batch 1024 at a constant rate
train_pipeline = _base_.train_pipeline
next(step for step in train_pipeline if step.type == 'RandomResizedCrop').scale = 384
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=384, backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = None
auto_scale_lr = dict(base_batch_size=1024)
