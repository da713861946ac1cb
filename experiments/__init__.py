"""One question per file or folder: `python -m experiments.NAME`."""

import mmfusion  # noqa: F401 - before torch: threads that wait must not spin
