"""`_base_.vheat` of vheat-t_backbone.py, with the package's import and checkpoint hook of runtime.py."""

_base_ = ['./runtime.py', './vheat-t_backbone.py']
