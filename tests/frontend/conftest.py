import pytest

from eva_lora import EvaConfig, eva_initialize
from support.models import lora, tiny_llama, token_batches


@pytest.fixture(scope="session")
def report():
    """Of a run that ends before every layer has converged."""
    with pytest.warns(UserWarning, match="EVA stopped at"):
        return eva_initialize(lora(tiny_llama()), token_batches(), EvaConfig(max_batches=4), progress=False)
