"""A package: in place of a directory without this file, ``import kernels`` would find ``eval/kernels.py``."""
