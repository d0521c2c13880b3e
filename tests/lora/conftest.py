import pytest

from support.models import load_minilm, minilm_text_batches


@pytest.fixture
def minilm():
    return load_minilm()


@pytest.fixture(scope="session")
def minilm_batches():
    return minilm_text_batches()
