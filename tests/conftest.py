"""What all tests share: one thread, no network, the pool of worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Sums differ between one and two threads, so results are compared on one. Before torch is imported.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest  # noqa: E402
from distributed import Pool  # noqa: E402

LONGEST = ("test_readme.py", "test_launchers.py", "test_benchmarks.py")  # of the slow tier: few tests, minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin, or at the end one worker would wait for the other."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes for tests over several ranks: pool.run(world_size, function, *args), see distributed.py."""
    workers = Pool()
    yield workers
    workers.close()
