"""``vheat_mm.hub``, the public name of :mod:`vheat_mm.apis.hub`."""

from vheat_mm.apis.hub import HubVHeat, HubVHeatClassifier

__all__ = ['HubVHeat', 'HubVHeatClassifier']
