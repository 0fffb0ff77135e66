"""Running vLLM's engine with the plugin and without it, each in a process of its own."""
