"""Models for ``torch.hub.load``, which runs this file of a checkout: the package need not be installed."""

dependencies = ['torch', 'mmengine']

from vheat_mm.apis.model_zoo import create_model as _create_model  # noqa: E402 (torch.hub reads dependencies first)


def vheat_tiny(pretrained=False, **arguments):
    """vHeat-T, 30.9 M parameters, 82.2 % top-1 on ImageNet-1K.

    Args:
        pretrained: True for the published weights, or the path or address of a checkpoint.
        arguments: See vheat_mm.create_model: features_only, out_indices, num_classes, img_size, in_channels, ...
    """
    return _create_model('vheat_tiny', pretrained, **arguments)


def vheat_small(pretrained=False, **arguments):
    """vHeat-S, 52.2 M parameters, 83.6 % top-1 on ImageNet-1K; arguments as for vheat_tiny."""
    return _create_model('vheat_small', pretrained, **arguments)


def vheat_base(pretrained=False, **arguments):
    """vHeat-B, 92.1 M parameters, 83.9 % top-1 on ImageNet-1K; arguments as for vheat_tiny."""
    return _create_model('vheat_base', pretrained, **arguments)
