"""Measurements: one command for each table of the README."""
