"""Methods that find the codes of weights."""
