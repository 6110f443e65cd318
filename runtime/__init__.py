"""The runtime layer: runs a compiled plan token by token and decides nothing."""
