"""Printers of tile expressions: C++ (scalar and vector), Triton and PyTorch, from one tree."""
