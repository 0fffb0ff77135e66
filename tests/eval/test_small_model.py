"""The small model's data and code, without training it."""

import math
import random

import numpy as np
import pytest
import torch

from engine.checkpoints import prompts
from engine.harness import complete, engine
from small_model.batches import make_batch, tokenise
from small_model.export import export
from small_model.model import Mode, SmallModel
from small_model.recipe import CONFIG, Recipe
from small_model.tasks import arithmetic, needle, repeat, tool_loop
from small_model.tokenizer import train_tokenizer
from small_model.train import Trainer
from vllm_dsv32.serving.encoding import encode_messages


def chats(num: int, split: str = "train") -> list:
    source = random.Random(7)
    makers = (
        lambda: tool_loop(source, split),
        lambda: arithmetic(source, split),
        lambda: needle(source, split, 200, len, 2),
        lambda: repeat(source, 9),
    )
    return [make() for make in makers for _ in range(num)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [encode_messages(c.messages, tools=c.tools or None, thinking=c.thinking) for c in chats(100)]
    return train_tokenizer(texts, CONFIG["vocab_size"])


def test_sums_are_right():
    source = random.Random(1)
    for _ in range(300):
        last = arithmetic(source).messages[-1]
        lines = (last.get("reasoning", "") + "\n" + last["content"]).strip().split("\n")
        for line in lines[:-1]:
            left, _, result = line.partition(" = ")
            assert eval(left) == int(result), line  # our own text, digits and operators only
        assert lines[-1] == f"#### {lines[-2].rpartition(' ')[2]}"


def test_held_out_keys_and_cities_are_not_trained_on():
    source = random.Random(2)
    asked = {
        split: {needle(source, split, 50, len).messages[0]["content"].rpartition("What")[2] for _ in range(400)}
        for split in ("train", "test")
    }
    assert not asked["train"] & asked["test"]
    cities = {
        split: {
            tool_loop(source, split).messages[3]["tool_calls"][0]["function"]["arguments"]["location"]
            for _ in range(400)
        }
        for split in ("train", "test")
    }
    assert not cities["train"] & cities["test"]


def test_what_is_spoken_is_what_the_assistant_says(tokenizer):
    for chat in chats(5):
        ids, spoken = tokenise(tokenizer, chat)
        text = tokenizer.decode([i for i, said in zip(ids, spoken, strict=True) if said], skip_special_tokens=False)
        assert text.endswith(f"{chat.messages[-1]['content']}<｜end▁of▁sentence｜>")
        assert text.count("<｜end▁of▁sentence｜>") == sum(m["role"] == "assistant" for m in chat.messages)


def test_batches_have_ascending_positions_that_reach_far(tokenizer):
    batch = make_batch(tokenizer, random.Random(3), "needle", 512, 16)
    assert batch.ids.shape == batch.positions.shape == batch.spoken.shape == (16, 512)
    assert bool((np.diff(batch.positions, axis=1) >= 1).all())
    assert 4096 < batch.positions.max() < 20_480


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    """All three stages; what comes of it is the same to the bit, wherever it stopped and whoever made the data."""
    monkeypatch.setattr(Trainer, "_exact", lambda *_: {})  # minutes here, at 16K
    config = CONFIG | {"hidden_size": 64, "num_hidden_layers": 2, "index_topk": 64}
    recipe = Recipe(steps=(3, 2, 3), tokens=512, curriculum=((0.0, (160, 256)),))
    Trainer(tmp_path / "at once", recipe, 0, config).run(1)
    for end in (2, 4, 7, math.inf):
        trainer = Trainer(tmp_path / "in parts", recipe, 0, config)
        trainer.clock = lambda trainer=trainer: float(trainer.step)
        trainer.run(2, end)
    (whole,), (parts,) = (
        (tmp_path / name / "checkpoint").glob("*.safetensors") for name in ("at once", "in parts")
    )
    assert whole.read_bytes() == parts.read_bytes()
    for name in ("loss.png", "recall.png"):
        assert (tmp_path / "in parts" / name).read_bytes().startswith(b"\x89PNG")


def test_the_trained_model_is_the_served_one(tokenizer, tmp_path):
    """What training computes, exported, against the plugin in vLLM: within top-k to rounding, past it nearly."""
    torch.manual_seed(0)
    model = SmallModel(CONFIG).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Not at their initial values, where mistakes would not show.
            tensor.add_(0.1 * torch.randn_like(tensor) if "norm" in name or "bias" in name else 0)
    export(model, tokenizer, tmp_path)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                tensor.copy_(tensor.bfloat16())
    with engine(tmp_path, tokenizer_mode="hf") as llm:
        completions = complete(llm, prompts(300, 30), 4)
    for completion in completions:
        ids = torch.tensor([completion.token_ids[:-1]])
        with torch.no_grad():
            hidden, _ = model(ids, torch.arange(ids.shape[1])[None], Mode.SPARSE)
            errors = (model.lm_head(hidden)[0] - completion.logits()).abs().amax(-1)
        assert errors[: CONFIG["index_topk"]].max() < 1e-4
        # Past top-k, quantising the index moves a few keys in and out of the selection.
        assert errors.median() < 0.2
