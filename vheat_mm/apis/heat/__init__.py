"""Pictures of heat: what a trained vHeat has learnt, as figures."""
