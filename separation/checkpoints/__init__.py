"""Checkpoints: their descriptions, their files, and the models that are built and loaded from them."""
