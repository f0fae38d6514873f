"""Named benchmarks: what they are, and running them."""
