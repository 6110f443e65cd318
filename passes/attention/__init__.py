"""Passes over how attention is computed, whatever the cache stores: what long prompts read, and in which order."""
