"""What made the sandbox's weights, and what they must reach."""
