"""Triton kernels and their launchers, imported at an operation's first launch."""
