"""`canopy models list|info`: names, facts, and one clear line for what is not a model."""

from __future__ import annotations

import json


def test_list_names_the_default(canopy):
    ran = canopy("models", "list")
    assert ran.code == 0 and ran.out.startswith("default")
    models = json.loads(canopy("models", "list", "--json").out)["models"]
    assert models["default"]["gsd_m"] > 0 and models["default"]["card"]["licence"]


def test_info_of_a_file(canopy, model_file):
    ran = canopy("models", "info", model_file)
    assert ran.code == 0
    assert "small-random" in ran.out and "red, green, blue at 0.5 m, crops of 64 px" in ran.out
    facts = json.loads(canopy("models", "info", model_file, "--json").out)
    assert facts["crop_px"] == 64 and len(facts["sha256"]) == 64


def test_info_of_the_default_shows_scores_by_site(canopy):
    ran = canopy("models", "info", "default")
    assert ran.code == 0 and "val scores at 1 m" in ran.out and "NEON" in ran.out


def test_unknown_and_foreign_models_are_refused(canopy, tmp_path):
    ran = canopy("models", "info", "defualt")
    assert ran.code == 2 and "default" in ran.error_line
    page = tmp_path / "page.safetensors"
    page.write_text("<html>not found</html>" * 9)
    ran = canopy("models", "info", page)
    assert ran.code == 2 and "not a safetensors file" in ran.error_line
