"""The operating system: signals, threads, locks and memory, and output files that are never lost or half written."""
