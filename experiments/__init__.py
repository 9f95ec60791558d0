"""Measurements and pictures: run each file as `python -m experiments.NAME` from the root of the
repository."""
