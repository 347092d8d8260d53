"""``fastrank score``: scores of a real model, written back to the records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrank import metrics
from fastrank.cli.main import main
from fastrank.data.packing import Group
from fastrank.modeling.pretrained import load_model, load_tokenizer
from fastrank.workflow import scoring


@pytest.fixture(scope="module")
def small(oasst_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short lists, one of them with a reply that is dropped, one with a single reply."""
    rows = [json.loads(line) for line in oasst_path.read_text().splitlines()]
    rows.sort(key=lambda r: len(r["responses"]) * len(str(r["prompt"])) + len(str(r["responses"])))
    rows = rows[:10]
    rows[1]["responses"][0] = " "
    rows[2]["responses"], rows[2]["ranks"] = rows[2]["responses"][:1], [0]
    path = tmp_path_factory.mktemp("score") / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _separate(model: torch.nn.Module, group: Group, normalize: str) -> list[float]:
    """Every candidate by a forward pass of its own."""
    scores = []
    for response in group.response_ids:
        ids = torch.cat([group.prompt_ids, response])[None]
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(group.prompt_ids)
        picked = logp[start - 1 : -1].gather(1, response[:, None])[:, 0]
        exponent = {"sum": 0.0, "mean": 1.0}[normalize] if normalize.isalpha() else float(normalize)
        scores.append(float(picked.sum()) / len(response) ** exponent)
    return scores


@pytest.mark.parametrize(
    ("normalize", "options"),
    [("mean", []), ("sum", ["--shared_prompts", "false"]), ("0.7", [])],
)
def test_scores_equal_separate_passes_and_are_written_back(
    options: list[str],
    normalize: str,
    small: Path,
    story_model_path: Path,
    tmp_path: Path,
    run_json: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastrank.data.load import load_groups

    monkeypatch.setattr(scoring, "_PACKS_PER_PORTION", 1)
    output = tmp_path / "scored.jsonl"
    argv = ["score", "--model", str(story_model_path), "--data", str(small)]
    argv += ["--normalize", normalize, "--output", str(output), "--max_tokens", "450"]
    result = run_json(*argv, *options)

    groups, _ = load_groups(
        small, load_tokenizer(story_model_path), context_length=512, min_candidates=1
    )
    # Three groups are larger than a pack, and are scored in parts.
    assert sum(group.num_tokens_shared > 450 for group in groups) == 3
    model = load_model(story_model_path, "float32")
    expected = [_separate(model, group, normalize) for group in groups]
    rows = [json.loads(line) for line in small.read_text().splitlines()]
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(written) == 10
    for row, line, want in zip(rows, written, expected, strict=True):
        scores = line.pop("model_scores")
        assert line == row
        if row is rows[1]:
            assert scores.pop(0) is None
        assert scores == pytest.approx(want, rel=1e-5, abs=1e-5)

    ordered = [(e, g.rewards) for e, g in zip(expected, groups, strict=True) if len(e) > 1]
    assert result["records_with_an_order"] == len(ordered) < 10
    assert result["metrics"] == pytest.approx(
        metrics.ranking_metrics([s for s, _ in ordered], [r.tolist() for _, r in ordered])
    )
    assert result["responses_scored"] == sum(map(len, expected))
    assert result["output"] == str(output)


def test_scores_of_other_formats(
    story_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat.jsonl"
    rows = [{"prompt": "Once", "response": r, "score": s} for r, s in ((" upon", 1), (" a", 0))]
    flat.write_text("\n".join(map(json.dumps, rows)))
    pairs = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Once", "chosen": " upon", "rejected": " a", "kept": {"as": "it is"}}
    pairs.write_text(json.dumps(pair))
    found = []
    for path in (flat, pairs):
        output = tmp_path / "out.jsonl"
        argv = ["score", "--model", str(story_model_path), "--data", str(path)]
        assert main([*argv, "--output", str(output), "--overwrite"]) == 0
        found.append(json.loads(output.read_text()))
    assert found[0]["responses"] == [" upon", " a"] and found[0]["scores"] == [1.0, 0.0]
    assert found[0]["model_scores"] == found[1]["model_scores"]
    assert found[1]["kept"] == {"as": "it is"}
    assert "pairwise_accuracy" in capsys.readouterr().out


def test_output_can_be_read_again(
    small: Path, story_model_path: Path, tmp_path: Path, run_json: Callable[..., dict[str, Any]]
) -> None:
    """The model agrees with itself: its scores as rewards are ordered perfectly."""
    output = tmp_path / "scored.jsonl"
    argv = ["score", "--model", str(story_model_path)]
    run_json(*argv, "--data", small, "--output", output)
    result = run_json(*argv, "--data", output, "--score_key", "model_scores")
    assert result["metrics"]["pairwise_accuracy"] == 1.0
    assert result["metrics"]["top1_accuracy"] == 1.0


def test_rewards_without_an_order_give_no_metrics(
    story_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sampled.jsonl"
    path.write_text(json.dumps({"prompt": "Once", "responses": [" upon", " a"]}))
    argv = ["score", "--model", str(story_model_path), "--data", str(path)]
    assert main([*argv, "--format", "unscored"]) == 0
    assert "metrics     none: the file's rewards order no pair" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max_tokens", "40"], "must fit into max_tokens=40, got 20 + 33 tokens"),
        (["--max_length", "513"], "must fit the model's context of 512 tokens, got 513"),
        (["--device", "abacus"], "--device must be auto, cpu or cuda[:index], got 'abacus'"),
        (["--device", "cuda:99"], "CUDA devices are here"),
        (["--attention", "magic"], "attention must be one of"),
    ],
)
def test_refusals_leave_an_older_output_alone(
    options: list[str],
    expected: str,
    small: Path,
    story_model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "scored.jsonl"
    output.write_text("older")
    argv = ["score", "--model", str(story_model_path), "--data", str(small)]
    assert main([*argv, "--output", str(output), "--overwrite", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and expected in err and err.count("\n") == 1
    assert output.read_text() == "older" and list(tmp_path.iterdir()) == [output]


def test_a_fault_in_the_middle_of_the_file_writes_nothing(
    small: Path, story_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(small.read_text() + "{")
    output = tmp_path / "scored.jsonl"
    argv = ["score", "--model", str(story_model_path), "--data", str(path)]
    assert main([*argv, "--output", str(output)]) == 2
    assert "line 11: malformed JSON" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_gives_no_numbers_is_refused(
    small: Path, story_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(story_model_path, "float32")
    argv = ["score", "--model", str(tmp_path / "poisoned"), "--data", str(small)]
    load_tokenizer(story_model_path).save_pretrained(tmp_path / "poisoned")
    end = model.config.eos_token_id
    for weight, rows, message in (
        (model.model.embed_tokens.weight, end, f"{small}:1: the model's scores are not finite"),
        (model.model.norm.weight, slice(None), "gives hidden states that are not finite"),
    ):
        with torch.no_grad():  # the first shows at the end of a response, the second everywhere
            weight[rows] = float("nan")
        model.save_pretrained(tmp_path / "poisoned")
        for shared in ("true", "false"):
            capsys.readouterr()
            assert main([*argv, "--shared_prompts", shared]) == 2
            err = capsys.readouterr().err
            assert message in err and err.count("\n") == 1, err
