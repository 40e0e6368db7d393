"""What was lost: distances between images, and errors along a trajectory."""
