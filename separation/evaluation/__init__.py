"""Scores of stems and the speed of models."""
