"""The CPU backend: operators in plain PyTorch and oneDNN, forward and backward."""
