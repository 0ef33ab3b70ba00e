"""Samples from words of one's own: requests, their rows, and the decoding as it happens."""
