"""Whether a server is fit for a run with thinking: reasoning apart from what is scored, and room for it."""

from serving_runs.chat import open_client

__all__ = ["check_reasoning_is_apart", "check_room"]

_QUESTION = "Mia has 3 pens and buys 4 more. How many pens does Mia have?"


def check_reasoning_is_apart(base_url: str, model: str) -> None:
    """Ask one question with thinking on.

    Args:
        base_url: of the server, with /v1.
        model: the name it is served under.

    Raises:
        SystemExit: no reasoning came, or it came as content.
    """
    client = open_client(base_url, timeout=300)
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": _QUESTION}],
        temperature=0,
        max_tokens=64,
        extra_body={"chat_template_kwargs": {"thinking": True}},
    )
    message = response.choices[0].message.model_dump()
    if not (message.get("reasoning") or message.get("reasoning_content")):
        raise SystemExit(
            "With thinking on, expected the reply's reasoning apart from its content (message.reasoning), got "
            f"content alone: {message['content']!r}. It would be scored as the answer. Start the server with "
            "--tokenizer-mode deepseek_v32 --reasoning-parser deepseek_v3."
        )


def check_room(max_model_len: int | None, max_tokens: int) -> None:
    """Compare what a reply may take with the longest context of the server, where that is known.

    Raises:
        SystemExit: the server would refuse every request.
    """
    if max_model_len is not None and max_model_len <= max_tokens:
        raise SystemExit(
            f"Replies may take {max_tokens} tokens, prompts come on top, and the server's --max-model-len is "
            f"{max_model_len}: it would refuse every request. Start it with more, or give a lower --max-tokens."
        )
