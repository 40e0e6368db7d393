"""What is done before weights are rounded: splits, divisors of channels."""
