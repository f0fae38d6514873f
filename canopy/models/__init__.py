"""Networks that turn RGB into metres of canopy height. They see tensors, never coordinates."""
