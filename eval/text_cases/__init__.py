"""Chat histories and model replies with hand-written expected values, for tests/serving and for eval/."""
