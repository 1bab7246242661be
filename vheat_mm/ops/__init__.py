"""The operators of vHeat on tensors: reference mathematics, and backends for CPUs and GPUs."""
