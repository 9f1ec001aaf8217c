"""What makes the coming sandbox's weights, and what they must reach."""
