"""Configs of the stability study: tasks, pairs, text. Each is a few lines over the defaults."""
