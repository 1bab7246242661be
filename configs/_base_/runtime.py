"""For every config: the package's import, and `_base_.vheat_hooks`, the checkpoint hook as `default_hooks` takes it.

MMEngine forbids a key in two bases, and the libraries' bases have `default_hooks`: hence the variable.
"""

custom_imports = dict(imports=['vheat_mm'], allow_failed_imports=False)
vheat_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
