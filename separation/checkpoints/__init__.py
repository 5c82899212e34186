"""Checkpoints: described, found, downloaded, read, loaded."""
