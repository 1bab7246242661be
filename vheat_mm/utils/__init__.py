"""Errors, texts, processes: what every layer needs."""
