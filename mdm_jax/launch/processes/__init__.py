"""Families of processes beyond those of launch/families.py, and the parts that they share."""
