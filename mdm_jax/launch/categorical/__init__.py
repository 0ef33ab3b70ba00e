"""Processes of continuous diffusion on categorical data: CDCD of text, CDTD of tables."""
