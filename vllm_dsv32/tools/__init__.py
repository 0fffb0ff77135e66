"""What a user runs around the plugin: ``vllm-dsv32 doctor`` and ``vllm-dsv32 make-checkpoint``."""
