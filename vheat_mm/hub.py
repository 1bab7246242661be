"""``vheat_mm.hub``, the public name of :mod:`vheat_mm.apis.hub`."""

from vheat_mm.apis.hub import hub_class

HubVHeat, HubVHeatClassifier = hub_class('HubVHeat'), hub_class('HubVHeatClassifier')

__all__ = ['HubVHeat', 'HubVHeatClassifier']
