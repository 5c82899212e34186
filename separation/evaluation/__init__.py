"""Scores of stems, and benchmarks."""
