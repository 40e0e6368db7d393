"""What is kept between evaluations, and whether a call computes, advances or reuses."""
