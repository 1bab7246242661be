"""What needs timm; nothing is imported here, since timm may be missing."""
