"""A test process computes on one thread: as many workers as cores, each with as many threads, are slower than one each.

It is set before anything imports torch, which reads it once; processes that tests start inherit it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
