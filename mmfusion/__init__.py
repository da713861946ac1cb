"""Low-rank multimodal fusion: everything that the top-level modules and the experiments import."""
