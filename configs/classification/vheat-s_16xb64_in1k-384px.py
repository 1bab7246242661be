_base_ = './vheat-t_16xb64_in1k-384px.py'
model = dict(backbone=dict(arch='small'))
load_from = 'checkpoints/vheat_small_384.pth'
