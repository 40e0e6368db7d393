"""The C++ backend: difference, codes, product and accumulation of an operator in one call."""
