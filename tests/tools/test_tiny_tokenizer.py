import random

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, TokenizersBackend

from vllm_dsv32.tools.tiny_tokenizer import (
    ADDED_TOKENS,
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    SPECIAL_TOKENS,
    make_tokenizer,
    tokenizer_size,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_every_id_below_the_size_has_its_own_token(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer_size())]
    assert None not in tokens
    assert len(set(tokens)) == tokenizer_size() == tokenizer.get_vocab_size()
    assert tokenizer_size() % 64 == 0
    assert tokenizer.id_to_token(tokenizer_size()) is None


def test_first_ids_are_the_published_ones(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)] == [0, 1, 2]


@pytest.mark.parametrize("token", ADDED_TOKENS)
def test_added_token_is_one_id_wherever_it_stands(tokenizer: Tokenizer, token: str) -> None:
    own = tokenizer.token_to_id(token)
    assert tokenizer.encode(token).ids == [own]
    around = tokenizer.encode(f"<{token}\n{token}>").ids
    assert around.count(own) == 2
    assert len(around) == 5
    kept = tokenizer.decode([own], skip_special_tokens=True)
    assert kept == ("" if token in SPECIAL_TOKENS else token)


def test_tags_that_the_parsers_need_are_not_special() -> None:
    assert not {"<think>", "</think>", "｜DSML｜", "<｜User｜>", "<｜Assistant｜>"} & SPECIAL_TOKENS


def test_text_is_its_utf8_bytes(tokenizer: Tokenizer) -> None:
    text = " héllo\r\n\t世界　\u00a0🙂 e\u0301 \x00 1234 \u200b"
    encoded = tokenizer.encode(text)
    assert len(encoded.ids) == len(text.encode())
    assert tokenizer.decode(encoded.ids) == text


def test_random_mixtures_round_trip(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    pieces = [
        *ADDED_TOKENS,
        "<",
        ">",
        "</",
        "｜",
        "<｜",
        "｜>",
        "▁",
        " ",
        "\n",
        "a",
        "世",
        "🙂",
        "<thin",
        "k>",
    ]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("loader", [AutoTokenizer, TokenizersBackend])
def test_transformers_loads_the_same_tokenizer(tokenizer: Tokenizer, tmp_path, loader) -> None:
    write_tokenizer(tmp_path)
    # AutoTokenizer looks at the model's type too.
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v32"}')
    loaded = loader.from_pretrained(tmp_path)
    text = f"{BOS_TOKEN}<｜User｜> 世界  1\n<｜Assistant｜><think>a</think><｜DSML｜invoke>"
    assert loaded.encode(text) == tokenizer.encode(text).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("") == []
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 1)
    assert len(loaded) == tokenizer_size()
