"""Warps and weightings that are fitted while training."""
