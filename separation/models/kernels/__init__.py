"""Faster twins of the layers: C++ for CPUs, Triton for GPUs. Each equals its plain twin in models/."""
