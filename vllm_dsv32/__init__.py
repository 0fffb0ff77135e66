"""DeepSeek-V3.2 for stock vLLM, as an out-of-tree plugin."""
