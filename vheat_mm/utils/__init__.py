"""Errors, message text and process ranks, used by all layers."""

from vheat_mm.utils.torchvision import ensure_torchvision


def register_all_modules(init_default_scope: bool = True) -> None:
    """For ``mmengine.hub.get_model``, which calls it in every package before it builds a model.

    Importing this package registered its modules; what is left are the libraries, which import torchvision.

    Args:
        init_default_scope: As OpenMMLab's packages have it; the config decides the scope.
    """
    ensure_torchvision()
