"""Losses between the latents of several modalities."""
