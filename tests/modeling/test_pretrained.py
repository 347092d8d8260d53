"""Models and tokenizers from folders; what is no model is one line and no network request."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from fastrank.data.hub import use_hub
from fastrank.errors import InputError
from fastrank.modeling.pretrained import (
    check_model_path,
    load_model,
    load_tokenizer,
    tokenizer_context,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)


@pytest.fixture
def copy(story_model_path: Path, tmp_path: Path) -> Path:
    """A writable copy of the story model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in story_model_path.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def _refused(function: Callable[[str], object], path: object) -> str:
    with pytest.raises(InputError) as caught:
        function(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_a_real_model(story_model_path: Path) -> None:
    model = load_model(story_model_path, torch.float32)
    assert model.dtype == torch.float32 and not model.training
    assert load_model(story_model_path, "bfloat16").dtype == torch.bfloat16
    tokenizer = load_tokenizer(story_model_path)
    assert tokenizer.eos_token_id == 1
    assert tokenizer_context(story_model_path, tokenizer) == 512


def test_context_without_a_model_is_the_tokenizer_s_own(copy: Path) -> None:
    (copy / "config.json").unlink()
    tokenizer = load_tokenizer(copy)
    assert tokenizer_context(copy, tokenizer) is None
    tokenizer.model_max_length = 77
    assert tokenizer_context(copy, tokenizer) == 77


@pytest.mark.parametrize("load", [load_model, load_tokenizer, check_model_path])
@pytest.mark.parametrize(
    "name", ["./nope", "/no/such", "~/nope", "a/b/c", "x\\y", "here/nope", "no/", "model.gz", "a b"]
)
def test_missing_paths(
    load: Callable, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert "no such model folder" in _refused(load, name)


def test_a_name_without_a_network_is_looked_for_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One request, no repetitions, then the cache of the Hub alone."""
    asked: list[str] = []

    class Session:
        def head(self, url: str, **options: object) -> None:
            asked.append(url)
            raise ConnectionError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    use_hub.cache_clear()
    try:
        for load in (check_model_path, load_model, load_tokenizer):
            message = _refused(load, "nobody/nothing")
            assert "it is not in the cache of the Hub, which cannot be reached" in message
        assert len(asked) == 1
        snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        assert check_model_path("nobody/nothing") == "nobody/nothing"
        assert len(asked) == 1
    finally:
        use_hub.cache_clear()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_hidden_layers": 10**7}, r"num_hidden_layers is 1e\+07, more than its \d+ tensors"),
        ({"num_hidden_layers": 1e300}, r"num_hidden_layers is 1e\+300, more than its"),
        ({"text_config": {"n_layer": 10**4}}, "n_layer is 1e.04, more than its"),
        ({"num_experts": 10**9}, "num_experts is 1e.09, more than 100,000"),
    ],
)
def test_a_configuration_is_no_larger_than_the_weights(
    settings: dict, said: str, copy: Path
) -> None:
    before = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(before | settings))
    for load in (load_model, check_model_path):
        assert re.search(said, _refused(load, copy))


def test_an_adapter_whose_pattern_takes_for_ever(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr("fastrank.modeling.pretrained._PATTERN_SECONDS", 0.3)
    adapter = tmp_path / "adapter"
    get_peft_model(load_model(copy), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        adapter
    )
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": str(copy)}))
    assert load_model(adapter)
    for name, value in (
        ("target_modules", "(([a-z0-9_.])+)+!"),
        ("exclude_modules", "(.*)*!"),
        ("rank_pattern", {"(([a-z0-9_.])+)+!": 4}),
    ):
        file.write_text(json.dumps(settings | {"base_model_name_or_path": str(copy), name: value}))
        assert "a pattern of adapter_config.json took more than 0.3 s" in _refused(
            load_model, adapter
        )


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", "a/b.safetensors", 3, ""]
)
def test_an_index_names_files_of_its_folder(file: object, copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    message = _refused(load_model, copy)
    assert "may only name safetensors files of its own folder, got " in message
    index.write_text("[" * 100_000)
    assert "index.json cannot be read" in _refused(load_model, copy)
    index.write_text("{}")
    assert "has no weight_map" in _refused(load_model, copy)


def test_other_things_than_model_folders(tmp_path: Path, copy: Path) -> None:
    assert "the model path is empty" in _refused(load_model, "")
    assert "it has no config.json" in _refused(load_model, tmp_path)
    assert "it has no tokenizer_config.json" in _refused(load_tokenizer, tmp_path)
    assert "expected a model folder, got a file" in _refused(load_model, copy / "config.json")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "unheard"}'),
        ("model.safetensors", "garbage"),
        ("model.safetensors", None),
    ],
)
def test_corrupt_models(file: str, text: str | None, copy: Path) -> None:
    (copy / file).unlink()
    if text is not None:
        (copy / file).write_text(text)
    message = _refused(load_model, copy)
    assert re.search("cannot be loaded as a causal language model|config.json cannot be", message)


def test_corrupt_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    assert "cannot be loaded as a tokenizer" in _refused(load_tokenizer, copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    message = _refused(load_model, copy)
    assert "its weights are pickles (pytorch_model.bin), which are not read" in message
    command = re.search(r'python -c "(.*)"$', message)
    assert command is not None and "AutoModelForCausalLM" in command[1]
    subprocess.run([sys.executable, "-c", command[1]], cwd=copy.parent, check=True)
    converted = copy.parent / f"{copy.name}-safetensors"
    assert torch.equal(
        load_model(converted).get_input_embeddings().weight,
        weights["model.embed_tokens.weight"],
    )
    assert load_tokenizer(converted).eos_token_id == 1


def test_a_model_that_would_lose_weights_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (copy / "config.json").write_text(json.dumps(config))
    extra = {"score.weight": torch.ones(1, 64), "v_head.bias": torch.ones(1)}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | old, copy / "model.safetensors", metadata={"format": "pt"})
    load_model(copy)
    save_file(weights | old | extra, copy / "model.safetensors", metadata={"format": "pt"})
    message = _refused(load_model, copy)
    assert "2 weights would be lost, the first is score.weight" in message
    assert "its folder names LlamaForSequenceClassification" in message


def test_incomplete_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    (copy / "model.safetensors").unlink()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    message = _refused(load_model, copy)
    assert "1 weights are missing, the first is model.norm.weight" in message


def test_a_model_without_a_language_head(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=32, is_decoder=True,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    assert "weights are missing" in _refused(load_model, tmp_path)


def test_code_of_a_repository_does_not_run(copy: Path) -> None:
    marker = copy / "ran"
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {
        "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}  # fmt: skip
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    assert "cannot be loaded as a causal language model" in _refused(load_model, copy)
    assert not marker.exists()
