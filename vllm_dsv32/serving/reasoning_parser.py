"""The reasoning parser `deepseek_v3`: DeepSeek-V3.2's own; vLLM's for the other models of that name."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser
from vllm.reasoning.deepseek_v3_reasoning_parser import DeepSeekV3ReasoningParser
from vllm.tokenizers import TokenizerLike

from vllm_dsv32.errors import ConfigError
from vllm_dsv32.serving import tokens as t
from vllm_dsv32.serving.encoding import ends_in_open_thinking
from vllm_dsv32.serving.thinking import wants_thinking
from vllm_dsv32.serving.thoughts import ThoughtSplitter, find_block
from vllm_dsv32.serving.tokenizer import Dsv32Tokenizer

_MODEL_TYPE: Final = "deepseek_v32"
# The tokens in which the start of a block of calls is looked for: more than it ever takes.
_BLOCK_WINDOW: Final = 64


class Dsv32ReasoningParser(ReasoningParser):
    """Tells DeepSeek-V3.2's thoughts from what it says. One object for one reply.

    Whether the reply starts inside thinking is read off the prompt where vLLM shows it; else it follows from
    the request, by the rules that the prompt was made with.

    vLLM registers one parser for DeepSeek-V3, V3.1 and V3.2. Constructing this class for any model but V3.2
    returns vLLM's own parser.
    """

    # vLLM then hands over each delta once and calls `finish_streaming` at the end.
    engine_based_streaming = True

    def __new__(cls, tokenizer: TokenizerLike, *args: Any, **kwargs: Any) -> Any:
        """An object of this class for DeepSeek-V3.2, of vLLM's for any other model."""
        if _is_deepseek_v32(tokenizer, kwargs.get("model_config")):
            return super().__new__(cls)
        return DeepSeekV3ReasoningParser(tokenizer, *args, **kwargs)

    def __init__(self, tokenizer: TokenizerLike, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._template_kwargs = kwargs.get("chat_template_kwargs") or {}
        self._is_thinking = wants_thinking(self._template_kwargs)
        self._think_start_id = self._token_id(t.THINK_START)
        self._think_end_id = self._token_id(t.THINK_END)
        self._dsml_id = self.vocab.get(t.DSML)
        self._splitter: ThoughtSplitter | None = None
        self._thoughts: list[str] = []
        # Whether the reply started inside thinking, once that is known.
        self._started_thinking: bool | None = None

    @property
    def reasoning_start_str(self) -> str:
        """The tag that opens thinking."""
        return t.THINK_START

    @property
    def reasoning_end_str(self) -> str:
        """The tag that closes thinking."""
        return t.THINK_END

    def adjust_request(self, request: Any) -> Any:
        """Have the think tags reach the parser, should the tokenizer call them special."""
        if self._is_thinking:
            request.skip_special_tokens = False
        return request

    # Over token ids: for the prompt, and for structured output, which starts where thinking ends.

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether thinking is over at the end of `input_ids`: a prompt, a reply, or both.

        The last think token decides, whatever earlier turns hold. Without one, the ids are a reply whose
        prompt is not shown.
        """
        start = self._last_think_token(input_ids)
        if start >= 0 and input_ids[start] == self._think_end_id:
            return True
        if start < 0 and not self._is_thinking:
            return True
        return self._find_block(input_ids, start + 1) >= 0

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether thinking ends with `delta_ids`, the last of `input_ids`."""
        delta = list(delta_ids)
        if self._think_end_id in delta:
            return True
        # A block that began in this turn: what the prompt's last think token closes off is older.
        recent = input_ids[-(len(delta) + _BLOCK_WINDOW) :]
        return self._find_block(recent, self._last_think_token(recent) + 1) >= 0

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The ids of `input_ids` that follow the thinking."""
        start = self._last_think_token(input_ids)
        if start >= 0 and input_ids[start] == self._think_end_id:
            return input_ids[start + 1 :]
        if start < 0 and not self._is_thinking:
            return input_ids
        block = self._find_block(input_ids, start + 1)
        return input_ids[block:] if block >= 0 else []

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many tokens of a reply, `token_ids`, are thoughts."""
        is_thinking = self._is_thinking if self._started_thinking is None else self._started_thinking
        if not is_thinking:
            return 0
        ids = list(token_ids)
        first = 1 if ids[:1] == [self._think_start_id] else 0
        end = ids.index(self._think_end_id) if self._think_end_id in ids else len(ids)
        block = self._find_block(ids[:end], 0)
        return (block if block >= 0 else end) - first

    # Over text: for the response.

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Split a whole reply into thoughts and content."""
        splitter = self._start(self._is_thinking and self._prompt_ends_thinking(request))
        thought, content = splitter.feed(model_output)
        thought += splitter.finish()
        if splitter.is_thinking and _is_constrained_from_the_start(request):
            self._started_thinking = False
            thought, content = "", thought
        return thought or None, content or None

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Take note of the prompt of a streamed reply: vLLM calls this if it ends inside thinking."""
        self._start(not self.is_reasoning_end(prompt_token_ids))

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """Take the next piece of a reply, `delta_text`; no other argument is read."""
        splitter = self._splitter or self._start(self._is_thinking)
        thought, content = splitter.feed(delta_text)
        return self._message(thought, content)

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Whether the streamed reply is past its thoughts."""
        return self._splitter is not None and not self._splitter.is_thinking

    def finish_streaming(self) -> DeltaMessage | None:
        """Take the end of the streamed thoughts."""
        return None if self._splitter is None else self._message(self._splitter.finish(), "")

    def get_streaming_fallback_content(self, text: str, request: Any) -> str | None:
        """What of the streamed thoughts was content: vLLM asks at the end of a reply that only thought."""
        if not _is_constrained_from_the_start(request):
            return None
        self._started_thinking = False
        held = self._splitter.finish() if self._splitter is not None else ""
        return "".join(self._thoughts) + held

    def _start(self, is_thinking: bool) -> ThoughtSplitter:
        self._started_thinking = is_thinking
        self._splitter = ThoughtSplitter(is_thinking=is_thinking)
        return self._splitter

    def _message(self, thought: str, content: str) -> DeltaMessage | None:
        if thought:
            self._thoughts.append(thought)
        if not thought and not content:
            return None
        return DeltaMessage(reasoning=thought or None, content=content or None)

    def _prompt_ends_thinking(self, request: Any) -> bool:
        """Whether the prompt of a request that thinks ends inside the thinking."""
        return ends_in_open_thinking(
            _final_message(request),
            thinking=True,
            add_generation_prompt=self._template_kwargs.get("add_generation_prompt"),
            continue_final_message=bool(self._template_kwargs.get("continue_final_message")),
        )

    def _token_id(self, token: str) -> int:
        token_id = self.vocab.get(token)
        if token_id is None:
            raise ConfigError(f"the tokenizer has no token {token}, which DeepSeek-V3.2's has; check its path")
        return token_id

    def _last_think_token(self, ids: Sequence[int]) -> int:
        """The index of the last think token; -1 if there is none."""
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] in (self._think_start_id, self._think_end_id):
                return index
        return -1

    def _find_block(self, ids: Sequence[int], start: int) -> int:
        """The index, from `start` on, of the token at which a block of calls starts; -1 if none does."""
        tail = list(ids[start:])
        if self._dsml_id is not None and self._dsml_id not in tail:
            return -1
        text = self.model_tokenizer.decode(tail)
        at = find_block(text)
        if at < 0:
            return -1
        # The token that holds the block's first character: the last one after which text up to it is whole.
        low, high = 0, len(tail)
        while low < high:
            middle = (low + high) // 2
            if len(self.model_tokenizer.decode(tail[: middle + 1])) <= at:
                low = middle + 1
            else:
                high = middle
        return start + low


def _is_deepseek_v32(tokenizer: TokenizerLike, model_config: Any) -> bool:
    """By the tokenizer, which every process of vLLM has; by the model's type where vLLM passes it."""
    if isinstance(tokenizer, Dsv32Tokenizer):
        return True
    return model_config is not None and model_config.hf_config.model_type == _MODEL_TYPE


def _final_message(request: Any) -> Mapping[str, Any] | None:
    """The last message of a chat; of the Responses API's items, a last one that continues may be thoughts alone."""
    if messages := getattr(request, "messages", None):
        return messages[-1]
    items = getattr(request, "input", None)
    is_thought = isinstance(items, list) and bool(items) and getattr(items[-1], "type", None) == "reasoning"
    return {"role": "assistant"} if is_thought else None


def _is_constrained_from_the_start(request: Any) -> bool:
    """Whether vLLM held the reply to a grammar from its first token, thoughts or not.

    It does so for a chat that hides its reasoning, even where the prompt ends inside thinking. What the grammar
    then produced is the answer, unless it holds calls alone and leaves the text around them free.
    """
    if not getattr(request, "messages", None) or request.include_reasoning:
        return False
    constraint = request.extract_structured_outputs()
    return constraint is not None and not _leaves_text_free(constraint.structural_tag)


def _leaves_text_free(structural_tag: str | None) -> bool:
    """Whether a structural tag, as JSON, begins only where the reply says one of its triggers."""
    if structural_tag is None:
        return False
    tag = json.loads(structural_tag)
    kind = tag.get("format", {})
    return "structures" in tag or (kind.get("type") == "triggered_tags" and not kind.get("at_least_one"))
