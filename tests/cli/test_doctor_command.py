"""``fastrank doctor`` reports what the choosing functions say."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig

from fastrank.cli import doctor
from fastrank.cli.main import main
from fastrank_kernels import choose_backend


def test_versions_and_install_lines(
    run_json, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"accelerate": "0.1.0", "torch": importlib.metadata.version("torch")}
    versions["transformers"] = "99.0"
    monkeypatch.setattr(doctor, "_installed", versions.get)
    found = {item["name"]: item for item in run_json("doctor")["packages"]}
    assert found["torch"]["status"] == "ok" and found["torch"]["install"] is None
    assert found["accelerate"]["status"] == "too old"
    assert found["transformers"]["status"] == "too new"
    assert found["accelerate"]["install"] == "pip install 'fastrank-lm[train]'"
    assert found["matplotlib"]["status"] == "missing"
    assert found["matplotlib"]["extra"] == "train"
    assert found["pyyaml"]["install"].startswith("pip install 'pyyaml>=")
    assert "pytest" not in found
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "0.1.0 (expected >=" in text and "pip install 'fastrank-lm[train]'" in text


def test_backends_and_strategies_with_reasons(run_json) -> None:
    device = run_json("doctor")["devices"][0]
    name, reason = choose_backend(None, torch.device("cpu"))
    assert device["loss_backend"] == {"name": name, "reason": reason}
    assert "bfloat16" in device["narrow_products"] and "float16" in device["narrow_products"]
    plans = {plan["call"]: plan for plan in device["strategies"]}
    assert plans["ranking loss"]["strategy"] == "group"
    assert plans["ranking loss"]["products"] == 3
    assert plans["ranking loss, frozen head"]["products"] == 2
    assert plans["scoring"]["products"] == 1
    assert all(layer["reason"] for layer in device["attention"])

    # 100 rows of logits fit: no group of 512 does.
    small = run_json("doctor", "--vocab", "1024", "--logits_memory", 100 * 4 * 1024)
    device = small["devices"][0]
    plans = {plan["call"]: plan for plan in device["strategies"]}
    assert plans["ranking loss"]["strategy"] == "recompute"
    assert "the largest group has 512 rows, 100 rows" in plans["ranking loss"]["reason"]
    assert plans["ranking loss, frozen head"]["strategy"] == "unit"


def test_models(story_model_path: Path, tmp_path: Path, run_json, capsys) -> None:
    model = run_json("doctor", "--model", str(story_model_path))["model"]
    assert model["shared_prompts"] and model["vocab"] == model["context"] == 512
    assert model["parameters"] == 260_032
    assert model["head"]["path"] == "fused" and "plain linear" in model["head"]["reason"]
    MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64).save_pretrained(tmp_path)
    model = run_json("doctor", "--model", str(tmp_path))["model"]
    assert not model["shared_prompts"] and model["reason"]
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
