"""Passes over the KV cache: insert it, choose which tokens it keeps, choose how it stores them."""
