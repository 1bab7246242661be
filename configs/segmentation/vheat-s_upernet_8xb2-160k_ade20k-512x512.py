_base_ = './vheat-t_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.4, init_cfg=dict(checkpoint='vheat_small')),
)
