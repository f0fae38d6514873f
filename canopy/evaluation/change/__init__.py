"""What two maps of one place say of each other: whether pixels and polygons changed, how far they agree."""
