"""Passes that take parts out of a model and leave smaller dense matrices."""
