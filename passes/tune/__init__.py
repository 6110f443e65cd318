"""Passes that train the model itself, to win back what passes before them cost."""
