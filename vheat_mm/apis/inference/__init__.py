"""Prediction on images, folders and videos with a trained detector, segmentor or classifier."""

from vheat_mm.apis.inference.predictor import Predictor
from vheat_mm.apis.inference.types import Item, Prediction, Sample

__all__ = ['Item', 'Prediction', 'Predictor', 'Sample']
