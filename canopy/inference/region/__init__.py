"""Regional mapping: thousands of tiles, many machines, nothing lost (`canopy map`).

`plan` settles and pins a run, `tiling` cuts it, `ledger` remembers, `task` makes one tile, `engines` and
`cluster` run tasks somewhere, `drive` keeps them busy, `catalog`, `mosaic` and `published` make the outputs.
"""
