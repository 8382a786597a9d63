"""One thread for each process of the tests, which are many and small: two threads would spend their
time waiting for each other. To be set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
