"""Training chips: pairs of image and height on one grid, how they are cut, read and augmented."""
