"""Faster implementations of the models' layers: C++ for CPUs, Triton for GPUs. Each is tested against a plain one."""
