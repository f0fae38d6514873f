"""Where images come from: files, STAC, web tiles and named sources, as RGB, validity and date on a grid."""
