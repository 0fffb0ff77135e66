"""The published accuracy runs, which were made with lm_eval, made again with its own tasks, scoring and client."""
