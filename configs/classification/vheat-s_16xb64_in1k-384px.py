_base_ = './vheat-t_16xb64_in1k-384px.py'
model = dict(backbone=dict(arch='small'))
load_from = 'vheat_small'
