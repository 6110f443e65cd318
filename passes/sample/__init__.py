"""Passes over the choice of tokens: sampling options that an artefact presets, and searches in the place of a draw."""
