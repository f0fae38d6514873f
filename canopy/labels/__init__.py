"""Where heights come from: airborne lidar and GEDI, found, fetched and made into metres."""
