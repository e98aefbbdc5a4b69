"""What is checked of a finished model: an export against it, and its tokens along the road."""
