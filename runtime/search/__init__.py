"""Searches: ways to choose tokens that take more than a draw from the model's law."""
