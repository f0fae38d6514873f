"""How far a map can be trusted: GEDI correction, conformal intervals, areas, quality flags."""
