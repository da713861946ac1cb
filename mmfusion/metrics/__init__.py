"""Scores, calibration and statistics."""
