"""The pieces of `cache.py`: texts and tasks, the model that recalls, what is measured of a recipe, peers, the table."""
