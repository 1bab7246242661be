"""Modules with parameters: the network, its classifier, its weights, test-time augmentation."""

from vheat_mm.models import release as release
from vheat_mm.models import tta as tta
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.vheat import VHeat

__all__ = ['VHeat', 'VHeatClassifier']
