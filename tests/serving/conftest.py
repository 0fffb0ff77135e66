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
settings.load_profile("serving")
