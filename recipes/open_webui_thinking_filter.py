"""
title: DeepSeek-V3.2 thinks
description: A switch in the chat that has DeepSeek-V3.2, served by vLLM, think before it answers.
version: 0.1.0
required_open_webui_version: 0.6.10
"""

from typing import Any

from pydantic import BaseModel, Field


class Filter:
    """Sets vLLM's `chat_template_kwargs` on the requests of chats where the switch is on."""

    class Valves(BaseModel):
        """What the administrator may set."""

        priority: int = Field(default=0, description="Filters of a higher priority run later")
        models: str = Field(
            default="deepseek",
            description="Only for models with one of these words in their id, by commas; empty: all",
        )

    def __init__(self) -> None:
        self.valves = self.Valves()
        # The chat shows a switch; while it is off, Open WebUI does not call the filter.
        self.toggle = True

    async def inlet(self, body: dict[str, Any], __user__: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask for thinking, unless the request already says whether to think."""
        words = [word.strip().lower() for word in self.valves.models.split(",") if word.strip()]
        model = str(body.get("model", "")).lower()
        if not words or any(word in model for word in words):
            body["chat_template_kwargs"] = {"thinking": True} | (body.get("chat_template_kwargs") or {})
        return body

    async def outlet(self, body: dict[str, Any], __user__: dict[str, Any] | None = None) -> dict[str, Any]:
        """Leave the answer as it is: Open WebUI shows the reasoning by itself."""
        return body
