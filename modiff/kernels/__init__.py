"""The same operation, executed differently; ``simulate`` is the definition."""
