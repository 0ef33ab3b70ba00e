"""Data of the benchmarks from files that are already on this machine (docs/benchmarks.md)."""
