"""Fusion models, their heads, and what is exact about them."""
