"""Figures on held-out text and on the clock."""
