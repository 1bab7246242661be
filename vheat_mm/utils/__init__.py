"""Errors, message text and process ranks, used by all layers."""
