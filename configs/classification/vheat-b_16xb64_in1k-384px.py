_base_ = './vheat-t_16xb64_in1k-384px.py'
model = dict(
    backbone=dict(arch='base'),
    head=dict(in_channels=1024),
)
load_from = 'vheat_base'
