"""The shipped test kit: servers that misbehave on demand, distant networks, and random images and trees."""
