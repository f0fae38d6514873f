"""Which chips a run uses: nested shares of labels, chances by kind, val seen or not, files and folders."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from canopy.chips.data import DataSettings, chances, choose_chips, evenly, label_subset
from canopy.chips.store import read_index, write_index
from canopy.errors import DataError


@pytest.fixture
def shards(make_folder, tmp_path) -> Path:
    """Four training, two val and one test chip, which a test may change."""
    return make_folder(tmp_path / "chips", ["train"] * 4 + ["val"] * 2 + ["test"])


def test_smaller_shares_lie_inside_larger_ones(rows):
    every = rows(300) + rows(40, kind="neon") + rows(1, kind="synth")
    ids = [{r.id for r in label_subset(every, share)} for share in (0.001, 0.01, 0.1, 0.5, 1.0)]
    assert all(a <= b for a, b in pairwise(ids))
    assert [len(i) for i in ids] == [3, 3 + 1 + 1, 30 + 4 + 1, 150 + 20 + 1, 341]
    assert label_subset(every, 0.1) == label_subset(every[::-1], 0.1)[::-1]
    assert label_subset(rows(1), 0.01) == rows(1) and label_subset([], 0.5) == []


def test_kinds_get_their_shares(rows):
    some = rows(30) + rows(10, kind="neon") + rows(5, kind="synth")
    got = chances(some, DataSettings(neon_share=0.2, synth_share=0.3))
    assert [got[:30].sum(), got[30:40].sum(), got[40:].sum()] == pytest.approx([0.5, 0.2, 0.3])
    assert chances(rows(30) + rows(10, kind="neon"), DataSettings(neon_share=0.2))[
        30:
    ].sum() == pytest.approx(0.2)
    assert chances(rows(7, kind="neon"), DataSettings()).sum() == pytest.approx(1)
    with pytest.raises(DataError, match="no training chip has a chance"):
        chances(rows(3, kind="synth"), DataSettings(synth_share=0.0))


def test_rare_heights_are_drawn_more_often_but_not_over_and_over(rows):
    some = rows(93) + rows(1, height_p95_m=1.0) + rows(6, height_p95_m=40.0)
    got = chances(some, DataSettings(bare_share=0.1, tall_share=0.2))
    assert got[93] == pytest.approx(0.04) and got[94:].sum() == pytest.approx(0.2)


def test_val_is_apart_or_seen(shards):
    apart, seen = (choose_chips(DataSettings(chips=shards, include_val=seen), 0.5) for seen in (False, True))
    assert [len(apart.train), len(apart.val), len(seen.train), len(seen.val)] == [4, 2, 6, 2]
    assert not apart.val_seen and seen.val_seen and apart.facts()["sha256"] != seen.facts()["sha256"]
    assert {c.row.id for c in apart.val} == {"c4", "c5"} and apart.facts()["val_ids"] == ["p4", "p5"]
    assert evenly(7, 3) == [0, 3, 6] and evenly(2, None) == evenly(2, 5) == [0, 1]


def test_whole_sites_are_left_out(shards):
    held = choose_chips(DataSettings(chips=shards, val_sites=["SITE1"]), 0.5)
    assert {r.site for r in held.train.rows} == {"site0"} and len(held.train) == 2
    assert [c.row.id for c in held.val] == ["c1", "c3", "c5"] and not held.val_seen
    assert {c.row.site for c in held.val} == {"site1"}  # train and val chips of it, never its test chips
    with pytest.raises(DataError, match="0 sites"):
        choose_chips(DataSettings(chips=shards, val_sites=["nowhere"]), 0.5)
    with pytest.raises(DataError, match=r"'site' begins the name of 2 sites.*site0; site1"):
        choose_chips(DataSettings(chips=shards, val_sites=["site"]), 0.5)
    with pytest.raises(DataError, match="no training chips"):
        choose_chips(DataSettings(chips=shards, val_sites=["site0", "site1"]), 0.5)


def test_the_public_data_module_gives_torchgeos_words_to_any_model(shards, tmp_path):
    import canopy

    data = canopy.data.ChipDataModule(shards, batch=3, crop_px=32)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, 3, 32, 32) and batch["mask"].shape == batch["weight"].shape == (
        3,
        1,
        32,
        32,
    )
    assert (torch.isnan(batch["mask"]) == (batch["weight"] == 0)).all()
    # Brightness is eight times the height (conftest); what is known lies on its own pixels.
    known = (batch["weight"] > 0) & (batch["image"].amin(1, keepdim=True) > 1.5 / 255)
    read = (batch["image"].mean(1, keepdim=True) * 255 / 8)[known]
    assert known.sum() > 200 and torch.allclose(read, batch["mask"][known], atol=0.13)
    again = canopy.data.ChipDataModule(shards, batch=3, crop_px=32)
    assert torch.equal(next(iter(again.train_dataloader()))["image"], batch["image"])
    (val,) = again.val_dataloader()
    assert val["image"].shape == (2, 3, 32, 32)

    class Linear(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Conv2d(3, 1, 1)

        def training_step(self, batch, _):
            error = (self.net(batch["image"]) - batch["mask"].nan_to_num()) * batch["weight"]
            return error.abs().mean()

        def validation_step(self, batch, _):
            self.seen = batch["image"].shape

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Linear()
    trainer = pl.Trainer(
        max_steps=2, val_check_interval=2, check_val_every_n_epoch=None, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert model.seen == (2, 3, 32, 32)


def test_the_licence_is_the_datas(shards):
    assert choose_chips(DataSettings(chips=shards), 0.5).licence == "not stated"
    rewrite(shards, {f"c{i}": {"licence": "CC0" if i % 2 else "CC-BY-4.0"} for i in range(4)})
    assert choose_chips(DataSettings(chips=shards), 0.5).licence == "CC-BY-4.0; CC0"


def test_no_chips_no_run(make_folder, tmp_path):
    with pytest.raises(DataError, match="no such chips"):
        choose_chips(DataSettings(chips=tmp_path / "none"), 0.5)
    with pytest.raises(DataError, match="no training chips"):
        choose_chips(DataSettings(chips=make_folder(tmp_path / "chips", ["val"])), 0.5)
    only = choose_chips(DataSettings(chips=make_folder(tmp_path / "train", ["train"])), 0.5)
    assert len(only.val) == 0 and list(only.val) == []


def rewrite(folder: Path, changes: dict[str, dict[str, object]]) -> Path:
    """Change the index rows of these ids."""
    rows = [dataclasses.replace(row, **changes.get(row.id, {})) for row in read_index(folder)]
    write_index(folder, rows)
    return folder


def test_chips_and_model_must_be_of_one_scale(make_folder, shards, tmp_path):
    coarse = make_folder(tmp_path / "coarse", ["train", "val"])
    rewrite(coarse, {name: {"id": f"x{name}", "gsd_m": 1.0, "label_gsd_m": 2.0} for name in ("c0", "c1")})
    words = r"coarse: chips of 1 m a pixel.*0\.5 m, as the model.*--gsd 0\.5, or .*model\.gsd_m"
    with pytest.raises(DataError, match=words):
        choose_chips(DataSettings(chips=coarse), 0.5)
    with pytest.raises(DataError, match=r"chips: chips of 0\.5 m a pixel.*1 m, as the model"):
        choose_chips(DataSettings(chips=shards), 1.0)
    assert len(choose_chips(DataSettings(chips=coarse), 1.0).train) == 1
    assert len(choose_chips(DataSettings(chips=coarse), None).train) == 1  # what has no scale of its own
    with pytest.raises(DataError, match=r"coarse: chips of 1 m a pixel.*as the other chips"):
        choose_chips(DataSettings(chips=[shards, coarse]), None)
    near = {
        f"c{i}": {"gsd_m": gsd} for i, gsd in enumerate((0.4910, 0.5090, 0.5))
    }  # whole multiples of pixels
    assert len(choose_chips(DataSettings(chips=rewrite(shards, near)), 0.5).train) == 4


def test_val_chips_beside_test_chips_are_never_trained_on(shards):
    rewrite(shards, {"c4": {"test_distance_m": 50.0}, "c5": {"test_distance_m": 50.01}})
    seen = choose_chips(DataSettings(chips=shards, include_val=True), 0.5)
    assert [r.id for r in seen.train.rows] == ["c0", "c1", "c2", "c3", "c5"]
    assert {c.row.id for c in seen.val} == {"c4", "c5"}  # it may still be looked at
    (shards / "settings.json").write_text(json.dumps({"splits": {"buffer_m": 500.0}}))
    assert len(choose_chips(DataSettings(chips=shards, include_val=True), 0.5).train) == 4


def test_chips_without_labels_are_not_trained_on(shards):
    rewrite(
        shards, {name: {"label_share": 0.0} for name in ("c0", "c1", "c4")} | {"c2": {"label_share": 0.3}}
    )
    assert [r.id for r in choose_chips(DataSettings(chips=shards), 0.5).train.rows] == ["c2", "c3"]
    rewrite(shards, {"c1": {"shots": 2}})  # weak labels are labels
    data = choose_chips(DataSettings(chips=shards), 0.5)
    assert [r.id for r in data.train.rows] == ["c1", "c2", "c3"] and {c.row.id for c in data.val} == {"c5"}
    rewrite(shards, {f"c{i}": {"label_share": 0.0, "shots": 0} for i in range(6)})
    with pytest.raises(DataError, match=r"no training chips.*labelled"):
        choose_chips(DataSettings(chips=shards), 0.5)
