"""Datasets, folds and the formats that they come in."""
