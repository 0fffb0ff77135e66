import copy
import inspect
import pickle

import pytest
from transformers import TokenizersBackend
from vllm.tokenizers.hf import maybe_make_thread_pool
from vllm.tokenizers.protocol import TokenizerLike

from text_cases.histories import HISTORIES
from vllm_dsv32.errors import MessageError
from vllm_dsv32.serving import tokens
from vllm_dsv32.serving.tokenizer import Dsv32Tokenizer

MESSAGES = [{"role": "user", "content": "Hé 你 🌍"}]
PROMPT = "<｜begin▁of▁sentence｜><｜User｜>Hé 你 🌍<｜Assistant｜></think>"


def test_loaded_as_vllm_loads_it(tokenizer_path):
    tokenizer = Dsv32Tokenizer.from_pretrained(
        str(tokenizer_path), trust_remote_code=False, revision=None, download_dir=None, truncation_side="left"
    )
    assert isinstance(tokenizer, Dsv32Tokenizer)
    assert tokenizer.truncation_side == "left"


def test_download_dir_is_transformers_cache_dir(tokenizer_path, monkeypatch):
    seen = {}
    load = TokenizersBackend.from_pretrained.__func__

    def spy(cls, *args, **kwargs):
        seen.update(kwargs)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(TokenizersBackend, "from_pretrained", classmethod(spy))
    Dsv32Tokenizer.from_pretrained(tokenizer_path, download_dir="/nowhere")
    assert seen == {"cache_dir": "/nowhere"}


def test_vllms_protocol(tokenizer):
    names = [name for name, _ in inspect.getmembers(TokenizerLike) if not name.startswith("_")]
    assert [name for name in names if not hasattr(tokenizer, name)] == []
    assert tokenizer.is_fast
    assert tokenizer.max_token_id == len(tokenizer) - 1
    assert tokenizer.get_vocab() is tokenizer.get_vocab(), "not cached"


def test_text(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == PROMPT


def test_ids(tokenizer):
    ids = tokenizer.apply_chat_template(MESSAGES)
    assert ids == tokenizer.encode(PROMPT, add_special_tokens=False)
    assert tokenizer.decode(ids) == PROMPT
    assert ids.count(tokenizer.bos_token_id) == 1


def test_truncation(tokenizer):
    assert len(tokenizer.apply_chat_template(MESSAGES, truncation=True, max_length=3)) == 3


def test_both_names_for_the_messages(tokenizer):
    prompts = [
        tokenizer.apply_chat_template(messages=MESSAGES, tokenize=False),
        tokenizer.apply_chat_template(conversation=MESSAGES, tokenize=False),
        tokenizer.apply_chat_template(conversation=MESSAGES, messages=MESSAGES, tokenize=False),
    ]
    assert prompts == [PROMPT] * 3


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.name)
def test_options_reach_the_encoder(history, tokenizer):
    assert tokenizer.apply_chat_template(history.messages, tokenize=False, **history.options) == history.prompt


def test_refusal(tokenizer):
    with pytest.raises(MessageError, match="unknown role 'x'"):
        tokenizer.apply_chat_template([{"role": "x"}])


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, maybe_make_thread_pool], ids=["plain", "pool"])
def test_copies(tokenizer_path, duplicate, wrap):
    tokenizer = wrap(Dsv32Tokenizer.from_pretrained(tokenizer_path))
    other = duplicate(tokenizer)
    assert isinstance(other, Dsv32Tokenizer)
    assert other.apply_chat_template(MESSAGES, thinking=True) == tokenizer.apply_chat_template(
        MESSAGES, thinking=True
    )
    assert other.get_vocab() == tokenizer.get_vocab()


def test_tags_are_tokens(tokenizer):
    for token in (
        tokens.BOS,
        tokens.EOS,
        tokens.USER,
        tokens.ASSISTANT,
        tokens.THINK_START,
        tokens.THINK_END,
        tokens.DSML,
    ):
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
        assert token in tokenizer.get_added_vocab()
