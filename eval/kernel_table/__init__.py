"""The pieces of ``eval/kernels.py``: problems, the two sides, timing, and the table."""
