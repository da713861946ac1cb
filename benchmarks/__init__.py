"""One measured claim per file: `python -m benchmarks.NAME`."""

import mmfusion  # noqa: F401 - before torch: threads that wait must not spin
