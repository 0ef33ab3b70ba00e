"""Configs of published benchmarks; docs/benchmarks.md has the figures to compare with."""
