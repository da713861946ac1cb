"""Frozen encoders: files on disk -> cached feature vectors."""
