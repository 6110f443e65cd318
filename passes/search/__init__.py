"""Passes that search: how much each part of a model may take of a budget for the whole."""
