"""Runs on preferences and rewards: settings, the experiment, rounds of answers."""
