"""Passes over what enters matrix products."""
