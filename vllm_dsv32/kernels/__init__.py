"""The operations of DeepSeek sparse attention: for each a contract, a torch reference, and faster rows.

Nothing here reads the environment, and nothing but :mod:`vllm_dsv32.kernels.vendor` knows vLLM.
:mod:`vllm_dsv32.kernels.dispatch` is the one table that says which implementations exist and which of them
takes a given problem.

Shapes are written with these letters throughout:

=====  =====================================================================
``T``  query tokens of the batch, all requests concatenated
``N``  attention heads on this rank
``H``  index heads (every rank has all of them)
``D``  index head width (128)
``R``  requests
``K``  index top-k (2048 in DeepSeek-V3.2)
``L``  keys: the longest visible context in the batch, or more
=====  =====================================================================

A *position* (pos) counts tokens within its sequence; a *block* is a page of the cache; a *slot* is
``block * block_size + offset``. -1 is the only sentinel.
"""
