"""Test-time augmentation: views of an image, and one prediction of a detector from several of them."""

from .classification import ClsTTAModel
from .crop import CropAt
from .model import InstanceSegTTAModel
from .views import ViewError

__all__ = ['ClsTTAModel', 'CropAt', 'InstanceSegTTAModel', 'ViewError']
