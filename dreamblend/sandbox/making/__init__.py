"""What makes the sandbox's weights, and what they must reach."""
