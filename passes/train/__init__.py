"""Passes that train: everything that gradients change in a Program."""
