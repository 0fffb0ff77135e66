"""Shared fixtures, and how many examples the properties are tried on.

pytest tests/serving                              50 examples each: seconds
pytest tests/serving --hypothesis-profile=full    20,000 examples each: about half an hour on one core;
                                                  with -n 2 --dist worksteal, on two
"""

import pytest
from hypothesis import settings

from vllm_dsv32.serving.tokenizer import Dsv32Tokenizer
from vllm_dsv32.tools.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    """A byte-level tokenizer with DeepSeek-V3.2's control tokens, as vLLM loads it."""
    return Dsv32Tokenizer.from_pretrained(tokenizer_path)


settings.register_profile("serving", max_examples=50, deadline=None, database=None)
settings.register_profile("full", settings.get_profile("serving"), max_examples=20_000)
# pytest's --hypothesis-profile is read after this.
settings.load_profile("serving")


def pytest_collection_modifyitems(items):
    """The full run takes longer than a test may otherwise."""
    if settings.default.max_examples > settings.get_profile("serving").max_examples:
        for item in items:
            item.add_marker(pytest.mark.timeout(0))
