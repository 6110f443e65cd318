"""Lowering: templates with encodings and epilogues spliced in, printed as C++ and Triton, built once and cached."""
