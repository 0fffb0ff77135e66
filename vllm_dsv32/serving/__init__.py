"""The text side of DeepSeek-V3.2 under vLLM: prompts, tool calls, reasoning."""
