"""Strategies of MMEngine's ``FlexibleRunner``."""
