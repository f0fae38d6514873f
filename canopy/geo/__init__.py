"""Where pixels are: CRSs, grids, areas, tiles, and rasters on disk. x is east, rows grow southward."""
