"""Most tests are small: a second thread would wait longer than it works. Set before torch is imported, also in
the processes that tests start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

FIRST = ("test_interpreter.py", "test_real_models.py")  # so long that another process would wait for them at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
