"""What vLLM itself ships for an operation, called through the operation's contract.

These rows of the dispatch table are for comparison: they are chosen by name only. Their modules import
vLLM, and are imported only when they are chosen.
"""
