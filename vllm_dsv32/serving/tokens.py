"""The special tokens and tags of DeepSeek-V3.2's text format: their only home."""

from typing import Final

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"

THINK_START: Final = "<think>"
THINK_END: Final = "</think>"

# DSML, the markup of tool calls. "｜DSML｜" is one token of the vocabulary; the tags around it are not.
DSML: Final = "｜DSML｜"
CALLS_START: Final = f"<{DSML}function_calls>"
CALLS_END: Final = f"</{DSML}function_calls>"
INVOKE: Final = f"<{DSML}invoke"
INVOKE_START: Final = f'{INVOKE} name="'
INVOKE_END: Final = f"</{DSML}invoke>"
PARAMETER_START: Final = f'<{DSML}parameter name="'
PARAMETER_END: Final = f"</{DSML}parameter>"

# What stands between an assistant's text and the block of its calls.
CALLS_SEPARATOR: Final = "\n\n"

RESULTS_START: Final = "<function_results>"
RESULTS_END: Final = "</function_results>"
RESULT_START: Final = "<result>"
RESULT_END: Final = "</result>"
