"""Passes over the decode loop: choose what drafts the tokens that the model then verifies."""
