"""Exact explanations of a run's predictions; `python -m mmfusion.explain`."""
