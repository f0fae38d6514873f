"""Both pretext tasks: exact resume, what is trained and what is not, what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from canopy.config import load_settings, validate_settings
from canopy.errors import ConfigError, DataError
from canopy.models.config import EncoderConfig, ModelConfig
from canopy.models.height import HeightModel
from canopy.training.callbacks import TrainingError
from canopy.training.fit import pretrain, view_stream
from canopy.training.optim import follow
from canopy.training.settings import FinetuneSettings, PretrainSettings
from canopy.training.ssl import DinoModule, MaeModule, PretrainModule, random_masks
from canopy.training.ssl_data import Views

STEPS = 9


def smoke(repo: Path, chips: Path, *more: str) -> PretrainSettings:
    changes = [f"data.chips={chips}", f"steps={STEPS}", "log_every=4", "probe.every=0", "tensorboard=false"]
    return load_settings(PretrainSettings, repo / "configs" / "pretrain" / "smoke.yaml", [*changes, *more])


def module_of(settings: PretrainSettings) -> tuple[PretrainModule, Views]:
    torch.manual_seed(0)
    stream = view_stream(settings)
    kind = MaeModule if settings.objective == "mae" else DinoModule
    return kind(settings, stream), stream.make(0)


# ---- a run ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["dinov2", "mae"])
def uninterrupted(request, repo, views_dir, tmp_path_factory) -> tuple[PretrainSettings, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    settings = smoke(repo, views_dir, f"objective={request.param}", "probe.every=6", "checkpoint_every=3")
    card = pretrain(settings, folder, command="test")
    assert card["steps"] == STEPS and card["probe"]["mae_m"] > 0
    return settings, folder


def test_stopped_and_resumed_is_bitwise_the_same(uninterrupted, tmp_path, monkeypatch):
    settings, whole = uninterrupted
    step_of = PretrainModule.optimizer_step

    def failing(self, *args, **kwargs):
        if self.global_step == 8:
            raise RuntimeError("power cut")
        step_of(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(PretrainModule, "optimizer_step", failing)
        pretrain(settings, tmp_path)
    torch.rand(7)  # whatever the generator did in between
    pretrain(settings, tmp_path, resume=True)
    a, b = (torch.load(d / "last.ckpt", weights_only=True) for d in (whole, tmp_path))
    assert a["global_step"] == b["global_step"] == STEPS
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    left, right = (ckpt["optimizer_states"][0] for ckpt in (a, b))
    for key, state in left["state"].items():
        assert all(torch.equal(v, right["state"][key][k]) for k, v in state.items())


def test_the_export_fits_a_height_model_and_says_where_it_is_from(uninterrupted, table):
    settings, folder = uninterrupted
    found = load_file(folder / "encoder.safetensors")
    wanted = HeightModel(settings.architecture).state_dict()
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in wanted.items() if k.startswith("encoder.")
    }
    with safe_open(folder / "encoder.safetensors", "pt") as file:
        header = file.metadata()
    card = json.loads(header["card"])
    assert header["format"] == "canopy-encoder" and card["objective"] == settings.objective
    assert card["steps"] == STEPS and card["data"]["chips"] == 12 and card["command"] == "test"
    assert card["settings"]["data"]["chips"] == [settings.data.chips[0].name]  # no folder of this machine
    described = EncoderConfig(**json.loads(header["encoder"]))
    assert described == settings.architecture.encoder
    terms = {"dinov2": {"loss/dino", "loss/ibot", "loss/koleo"}, "mae": {"loss/mae"}}
    logged = terms[settings.objective] | {"images_per_s", "lr", "std/class", "rank/patch", "probe/mae_m"}
    lines = table(folder)
    assert logged <= set(lines[0])
    probed = {int(line["step"]): float(line["probe/mae_m"]) for line in lines if line["probe/mae_m"]}
    assert sorted(probed) == [0, 6, STEPS] and probed[STEPS] == pytest.approx(card["probe"]["mae_m"])
    assert load_settings(PretrainSettings, folder / "config.yaml") == settings
    again = pretrain(settings, folder, resume=True)  # a finished run takes no step
    assert (again["steps"], again["probe"]) == (STEPS, card["probe"])


def test_a_run_goes_on_with_the_settings_and_chips_it_was_started_with(repo, views_dir, tmp_path):
    chips, run = tmp_path / "chips", tmp_path / "run"
    chips.mkdir()
    for name in ("index.csv", "shards"):
        (chips / name).symlink_to(views_dir / name)
    pretrain(smoke(repo, chips, "steps=1", "views.locals=0"), run)
    changes = ["lr=0.5", "views.locals=1", "dino.koleo_weight=0.3", "data.splits=[train, val]"]
    with pytest.raises(ConfigError, match=r"data\.splits, dino\.koleo_weight, lr, views\.locals"):
        pretrain(smoke(repo, chips, "steps=2", *changes), run, resume=True)
    longer = smoke(repo, chips, "steps=2", "views.locals=0", "log_every=1", "views.global_px=48")
    assert pretrain(longer, run, resume=True)["steps"] == 2
    assert {p.name for p in run.glob("log*")} == {"log", "log2"}
    (chips / "index.csv").unlink()  # the same folder with other chips in it
    (chips / "index.csv").write_text("".join((views_dir / "index.csv").open().readlines()[:-6]))
    with pytest.raises(DataError, match="the run has chips"):
        pretrain(smoke(repo, chips, "steps=3", "views.locals=0"), run, resume=True)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_bad_steps_leave_no_trace_and_the_third_stops_the_run(repo, views_dir, tmp_path, monkeypatch, how):
    whole, kept = DinoModule.terms, {}

    def poisoned(self, views):
        step = self.global_step
        kept[step] = {k: v.clone() for k, v in self.state_dict().items()}
        terms = whole(self, views)
        if step not in (2, 3, 6):
            return terms
        # The root of 0 is 0, and its slope is not a number.
        wrong = float("nan") if how == "loss" else (self.mask_token.sum() * 0).sqrt()
        return terms | {"ibot": terms["ibot"] + wrong}

    monkeypatch.setattr(DinoModule, "terms", poisoned)
    assert pretrain(smoke(repo, views_dir, "steps=5"), tmp_path)["steps"] == 5
    assert all(torch.equal(value, kept[4][name]) for name, value in kept[2].items())
    with pytest.raises(TrainingError, match=r"is nan.* at step 6, and so it was at \[2, 3\]"):
        pretrain(smoke(repo, views_dir), tmp_path, resume=True)


# ---- DINOv2 and MAE ------------------------------------------------------------------------------------
def test_only_the_student_gets_gradients_and_the_teacher_follows(repo, views_dir):
    module, views = module_of(smoke(repo, views_dir))
    terms = module.terms(views)
    assert set(terms) == {"dino", "ibot", "koleo"}
    sum(terms.values()).backward()
    assert all(p.grad is None for p in module.teacher.parameters())
    assert all(p.grad is not None for _, p in module.trained())
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for _, p in module.trained()}
    before = {k: v.clone() for k, v in module.teacher.named_parameters()}
    with torch.no_grad():
        for p in module.student.parameters():
            p.add_(1)
    follow(module.teacher, module.student, 0.75)
    for name, value in module.teacher.named_parameters():
        assert torch.allclose(value, before[name] + 0.25, atol=1e-5)


@pytest.mark.parametrize("norm_taps", [True, False])
def test_a_batch_is_learned(repo, views_dir, norm_taps):
    module, views = module_of(smoke(repo, views_dir, f"model.encoder.norm_taps={norm_taps}"))
    optimiser = torch.optim.AdamW([p for _, p in module.trained()], lr=3e-3)
    seen = []
    for _ in range(12):
        torch.manual_seed(0)
        terms = module.terms(views)
        total = terms["dino"] + terms["ibot"]
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        seen.append(float(total.detach()))
    assert seen[-1] < seen[0] - 0.1


@pytest.mark.parametrize(
    ("grid", "share", "unit", "kept"),
    [((8, 8), 0.75, 1, 16), ((3, 3), 0.5, 1, 5), ((2, 2), 0.99, 1, 1), ((4, 6), 0.75, 2, 8)],
)
def test_masks_keep_what_they_should(grid, share, unit, kept):
    keep, mask = random_masks(5, grid, share, unit, torch.device("cpu"))
    assert keep.shape == (5, kept) and (mask.sum(dim=1) == grid[0] * grid[1] - kept).all()
    assert not mask.gather(1, keep).any() and (keep.diff(dim=1) > 0).all()
    squares = mask.reshape(5, grid[0] // unit, unit, grid[1] // unit, unit).float()
    assert squares.mean((2, 4)).unique().tolist() == [0.0, 1.0]


def test_hidden_pixels_change_nothing_but_the_target(repo, views_dir):
    # Without a stem; what a stem does is tested at the encoder, and its norms are measured on whole images.
    module, views = module_of(smoke(repo, views_dir, "objective=mae", "model.encoder.stem=[]"))
    torch.manual_seed(1)
    module.eval().terms(views)
    once = module.looked_at[1]
    torch.manual_seed(1)
    rgb = views.wide[:, 0]
    _, mask = random_masks(len(rgb), (2, 2), 0.75, 1, torch.device("cpu"))
    hidden = mask.reshape(-1, 1, 2, 1, 2, 1).expand(-1, 3, -1, 16, -1, 16).reshape(rgb.shape)
    torch.manual_seed(1)
    module.terms(views._replace(wide=rgb.masked_fill(hidden, 0.9)[:, None]))
    assert torch.equal(once, module.looked_at[1])


# ---- settings ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"views": {"global_px": 100}}, "patches of 16"),
        ({"views": {"local_area": [0.5, 0.2]}}, "rising"),
        ({"objective": "simclr"}, "dinov2"),
        ({"dino": {"wait": 1}}, "dino.wait"),
        ({"views": {"globals": 1}}, "at least two"),
        ({"model": {"encoder": {"dim": 30, "heads": 4}}}, "30"),
        ({"objective": "mae", "mae": {"unit": 4}}, "mae.unit 4"),
        ({"device": "auto", "devices": 2}, "device="),
        ({"model": {"encoder": {"family": "cnn", "network": "resnet18", "patch": 32}}}, "transformers"),
    ],
)
def test_bad_settings_are_named(raw, named):
    with pytest.raises(ConfigError, match=named):
        validate_settings(PretrainSettings, raw, "config")


@pytest.mark.parametrize("objective", ["dinov2", "mae"])
def test_every_shipped_config_is_valid(repo, objective):
    files = sorted((repo / "configs" / "pretrain").glob("*.yaml"))
    assert {f.stem for f in files} >= {"smoke", "cpu-small", "small", "base", "large-published"}
    for file in files:
        load_settings(PretrainSettings, file, [f"objective={objective}"])
    ours = load_settings(PretrainSettings, repo / "configs/pretrain/cpu-small.yaml").architecture.encoder
    theirs = load_settings(FinetuneSettings, repo / "configs/finetune/canopy-small-scratch.yaml").model
    assert ours == ModelConfig.from_dict(theirs).encoder
