"""Training data for your own models: the chips of `canopy data chips` as a Lightning data module.

    data = canopy.data.ChipDataModule("chips", batch=16, crop_px=256)
    batch = next(iter(data.train_dataloader()))  # image (16, 3, 256, 256), mask (16, 1, 256, 256) in metres
    pytorch_lightning.Trainer(max_steps=1000).fit(your_model, datamodule=data)

Needs the extra `train`, no geo library.
"""

from canopy.chips.augment import AugmentSettings
from canopy.chips.data import ChipDataModule, DataSettings
from canopy.chips.store import Chip, ChipShards

__all__ = ["AugmentSettings", "Chip", "ChipDataModule", "ChipShards", "DataSettings"]
