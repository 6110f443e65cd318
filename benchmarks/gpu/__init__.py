"""The pieces of `gpu.py`: what a contest is, how it is timed and shown, and a file for each family of kernels."""
