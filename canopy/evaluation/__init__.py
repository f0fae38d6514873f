"""Judging any canopy height map: against lidar, GEDI and field plots, and against another map."""
