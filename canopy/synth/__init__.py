"""The procedural forest: every pixel, point and shot of it is known exactly."""
