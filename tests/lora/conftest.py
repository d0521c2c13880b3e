import pytest

from support.models import load_minilm, minilm_text_batches


@pytest.fixture
def minilm():
    return load_minilm()


@pytest.fixture(scope="session")
def minilm_batches():
    """About 6000 rows: four times as many as MiniLM's widest layer has features."""
    return minilm_text_batches()[:5]
