"""Most tests are small: a second thread would wait longer than it works. Set before torch is imported, also in
the processes that tests start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
