"""Test-time augmentation: several views of an image, and one prediction from them."""

from vheat_mm.models.tta.classification import ClsTTAModel
from vheat_mm.models.tta.crop import CropAt
from vheat_mm.models.tta.instance_seg import InstanceSegTTAModel
from vheat_mm.utils.errors import ViewError

__all__ = ['ClsTTAModel', 'CropAt', 'InstanceSegTTAModel', 'ViewError']
