_base_ = ['mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', '../_base_/mask2former_vheat-t.py']
# Not from _base_/runtime.py: mmseg's config has custom_imports too, and MMEngine forbids a key in two bases.
custom_imports = dict(imports=['vheat_mm'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
model = dict(backbone=_base_.backbone, decode_head=dict(in_channels=_base_.channels))
optim_wrapper = _base_.backbone_rates
