_base_ = ['mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', '../_base_/runtime.py']
default_hooks = _base_.vheat_hooks
