"""Fusion models, baseline heads, decompositions, identifiability."""
