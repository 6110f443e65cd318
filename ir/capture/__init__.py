"""Capture: torch modules, Hugging Face models and their checkpoints become Programs."""
