"""The pieces of `gpu.py`: a file for each family of kernels, what a contest is, how it is timed, what is shown of it."""
