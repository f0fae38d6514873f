"""Single trees of a height map: found in it, or given as polygons."""
