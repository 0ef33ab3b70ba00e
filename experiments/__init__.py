"""Launcher, configs, reproductions and benchmarks; not part of the package."""
