"""Many tiles of one region: dask workers, a ledger that survives them, a mosaic and a STAC catalog."""
