"""Drafters: each proposes a small tree of candidate tokens for every row, which the model then verifies."""
