"""Around a Runner: processes, resumable data loading, provenance of a run."""
