"""Errors, message text and process ranks, used by all layers."""

# mmengine.hub.get_model calls this function of each package's utils before it builds a model. Importing this package
# registered its modules; what is left is torchvision, which the libraries import.
from vheat_mm.utils.torchvision import ensure_torchvision as register_all_modules

__all__ = ['register_all_modules']
