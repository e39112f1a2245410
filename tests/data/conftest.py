"""What the tests of data share: a real tokenizer."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from fedkseed.models.loading import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(stories260k: Path) -> PreTrainedTokenizerBase:
    """Of stories260k; tests leave it as it is."""
    return load_tokenizer(stories260k)


@pytest.fixture
def own_tokenizer(stories260k: Path) -> PreTrainedTokenizerBase:
    """The same, for a test to change."""
    return load_tokenizer(stories260k)
