"""Building a Runner: processes, data loading, environment."""
