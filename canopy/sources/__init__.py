"""Where pixels and labels come from: files, catalogs, web tiles, lidar, GEDI, and a synthetic forest."""
