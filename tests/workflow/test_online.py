"""Online training: what is sampled, rewarded and penalised; resuming; several processes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import online_runs
import pytest
import tiny_models
import torch
from killing import run_until_lines
from torchrun import torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrank.cli.main import main
from fastrank.errors import InputError
from fastrank.training.callbacks import read_metrics
from fastrank.workflow import online
from fastrank.workflow.candidates import group_of_item
from fastrank.workflow.items import PromptItem
from fastrank.workflow.online_data import Round, RoundCandidates, round_metrics

SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--kl_weight", "0.1"]
TIMED = ("runtime", "per_second", "tokens_per_second")


def train(inputs: Path, output: Path, model: Path, *more: str) -> int:
    return main(online_runs.arguments(inputs, output, model, *more))


def rounds_of(run: Path) -> list[Round]:
    return [Round.read(path) for path in sorted((run / "online").glob("round-*.jsonl"))]


def logged(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not any(word in k for word in TIMED)}
        for row in rows
        if "train_runtime" not in row
    ]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    online_runs.write_inputs(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(policy_path, tmp_path_factory) -> Path:
    """A run that nothing interrupted, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("online")
    online_runs.write_inputs(folder)
    assert train(folder, folder / "run", policy_path, *SAVING) == 0
    return folder


def test_a_text_prompt_as_a_message_is_one_in_sampling_and_in_training(
    inputs, policy_path, monkeypatch
):
    made = []

    def stop(*args, **kwargs):
        made.append(kwargs["job"])
        raise InputError("enough")

    monkeypatch.setattr(online, "train", stop)
    monkeypatch.setattr(online, "RoundMaker", lambda **fields: made.append(fields))
    more = ["--as_chat", "true", "--chat_template", "chatml"]
    assert train(inputs, inputs / "run", policy_path, *more) == 2
    fields, job = made
    prompt = job.tokenizer.decode(fields["encoded"].ids[0])
    assert prompt.endswith("<|im_start|>user\n0<|im_end|>\n<|im_start|>assistant\n")
    item = replace(fields["items"][0], responses=["x"], scores=[1.0], sources=["m"], ended=[True])
    group = group_of_item(item, job.tokenizer, fields["limit"])
    assert job.tokenizer.decode(group.prompt_ids) == prompt


def test_rounds_follow_the_steps(whole):
    first, second = rounds_of(whole / "run")
    assert [first.step, second.step] == [0, 4] and [first.number, second.number] == [0, 1]
    # 9 prompts, 4 a step: an epoch is 3 steps, so the first round passes over every prompt once
    # and begins the second epoch; a prompt has one set of candidates a round.
    assert [own.index for own in first.candidates] == list(range(9))
    assert 4 < len(second.candidates) <= 8
    for own in first.candidates + second.candidates:
        assert all(own.fresh) and 1 <= len(own.responses) <= 4
        assert len(set(own.responses)) == len(own.responses)
        expected = [sum(c in "aeiouAEIOU" for c in r) - len(r) / 20 for r in own.responses]
        assert own.rewards == pytest.approx(expected)
    drawn = sum(len(own.responses) for own in first.candidates)
    assert drawn + first.duplicates + first.empty == 36


def test_the_model_samples_from_what_it_has_become(whole):
    first, second = rounds_of(whole / "run")
    assert all(ratio == 0 for own in first.candidates for ratio in own.log_ratios)
    moved = [ratio for own in second.candidates for ratio in own.log_ratios]
    assert max(map(abs, moved)) > 1e-3
    rows = {row["online/round"]: row for row in logged(whole / "run") if "online/round" in row}
    assert rows[0]["step"] == 0 and rows[1]["step"] == 4
    assert rows[0]["online/kl"] == 0 and rows[1]["online/kl"] == pytest.approx(
        sum(moved) / len(moved)
    )
    assert (whole / "run" / "online.png").read_bytes().startswith(b"\x89PNG")


def test_the_penalty_is_the_log_ratio_of_separate_forward_passes(whole, policy_path):
    (_, second) = rounds_of(whole / "run")
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        for path in (whole / "run" / "checkpoint-4", policy_path)
    )
    rows = [json.loads(x) for x in (whole / "prompts.jsonl").read_text().splitlines()]

    def logprob(model, prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(answer))

    total, tokens = 0.0, 0
    for own in second.candidates:
        prompt = tokenizer.encode(rows[own.index]["prompt"])
        for i, response in enumerate(own.responses):
            answer = tokenizer.encode(response) + [2] * own.ended[i]
            assert own.num_tokens[i] == len(answer)
            below = logprob(reference, prompt, answer)
            ratio = logprob(policy, prompt, answer) - below
            assert own.log_ratios[i] == pytest.approx(ratio, abs=1e-4)
            penalty = 0.1 * ratio / len(answer)
            assert own.scores[i] == pytest.approx(own.rewards[i] - penalty, abs=1e-4)
            total, tokens = total + below, tokens + len(answer)
    row = next(r for r in logged(whole / "run") if r.get("online/round") == 1)
    assert row["online/perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)


def test_the_penalty_may_be_a_sum(policy_path, inputs, tmp_path):
    options = ["--kl_weight", "0.5", "--kl_reduction", "sum", "--learning_rate", "1e-2"]
    assert train(inputs, tmp_path / "run", policy_path, *options) == 0
    own = rounds_of(tmp_path / "run")[1].candidates
    penalties = [
        (r - s, k)
        for part in own
        for r, s, k in zip(part.rewards, part.scores, part.log_ratios, strict=True)
    ]
    assert all(lost == pytest.approx(0.5 * k, abs=1e-5) for lost, k in penalties)
    assert max(abs(lost) for lost, _ in penalties) > 1e-3


def assert_same_end(inputs: Path, run: Path, model: Path, expected: Path) -> None:
    """Resume a run, which then ends with the expected run's weights and log."""
    assert train(inputs, run, model, *SAVING, "--resume_from_checkpoint", "true") == 0
    assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert logged(run) == logged(expected)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_resumed_run_ends_the_same_bit_for_bit(whole, policy_path, tmp_path, step):
    """From the middle of the first round, from between the rounds, from the middle of the last."""
    online_runs.write_inputs(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    for later in range(step + 1, online_runs.STEPS + 1):
        shutil.rmtree(run / f"checkpoint-{later}")
    (run / "model.safetensors").unlink()
    if step == 4:  # killed before the second round was drawn
        (run / "online" / "round-00001.jsonl").unlink()
    assert_same_end(tmp_path, run, policy_path, whole / "run")
    for name in ("round-00000.jsonl", "round-00001.jsonl"):
        assert (run / "online" / name).read_bytes() == (
            whole / "run" / "online" / name
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("lines", [3, 7])
def test_a_killed_run_resumes_to_the_same(whole, policy_path, tmp_path, lines):
    """SIGKILL in the first and in the second round, wherever that happens to fall."""
    online_runs.write_inputs(tmp_path)
    run = tmp_path / "run"
    arguments = online_runs.arguments(tmp_path, run, policy_path, *SAVING)
    run_until_lines(arguments, run / "metrics.jsonl", lines=lines)
    assert not (run / "model.safetensors").exists()
    assert_same_end(tmp_path, run, policy_path, whole / "run")


def test_resuming_without_the_rounds_file_is_one_line(whole, policy_path, tmp_path, capsys):
    online_runs.write_inputs(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    shutil.rmtree(run / "checkpoint-6")
    (run / "online" / "round-00001.jsonl").write_text("{}")
    options = ["--kl_weight", "0.1", "--resume_from_checkpoint", "true"]
    assert train(tmp_path, run, policy_path, *options) == 2
    assert "resume from the checkpoint of an earlier round" in capsys.readouterr().err


def test_two_processes_sample_and_train_as_one(policy_path, tmp_path):
    script = str(Path(online_runs.__file__))
    options = ["--kl_weight", "0.1", "--optim", "sgd", "--learning_rate", "0.05"]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        online_runs.write_inputs(folder)
    assert train(one, one / "run", policy_path, *options) == 0
    more = [*options, "--per_device_train_batch_size", "2"]
    torchrun(2, script, str(two / "run"), str(policy_path), *more)
    for first, second in zip(rounds_of(one / "run"), rounds_of(two / "run"), strict=True):
        assert (first.duplicates, first.empty) == (second.duplicates, second.empty)
        for a, b in zip(first.candidates, second.candidates, strict=True):
            assert (a.index, a.responses, a.rewards) == (b.index, b.responses, b.rewards)
            assert a.log_ratios == pytest.approx(b.log_ratios, abs=1e-3)
    trained = [
        AutoModelForCausalLM.from_pretrained(folder / "run").state_dict() for folder in (one, two)
    ]
    before = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, atol=2e-5, rtol=0)
    assert max(float((trained[0][n] - w).abs().max()) for n, w in before.items()) > 1e-3


def test_generation_leaves_training_as_it_was(policy_path, inputs, tmp_path, monkeypatch):
    """Modes, settings, random state and attributes of the model around every round."""
    from fastrank.workflow import online_trainer

    seen = []

    def snapshot(trainer: Any) -> dict[str, Any]:
        model = trainer.lm
        return {
            "training": [m.training for m in model.modules()],
            "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
            "cache": model.config.use_cache,
            "generation": model.generation_config.to_dict(),
            "attributes": sorted(model.__dict__),
            "grads": [p.requires_grad for p in model.parameters()],
            "random": torch.get_rng_state().tolist(),
        }

    real = online_trainer.OnlineTrainer._draw

    def watched(self: Any, *arguments: Any) -> Round:
        self.lm.train()
        self.lm.model.norm.eval()  # one module in another mode than the rest
        before = snapshot(self)
        found = real(self, *arguments)
        assert snapshot(self) == before
        seen.append(before["checkpointing"])
        return found

    monkeypatch.setattr(online_trainer.OnlineTrainer, "_draw", watched)
    options = ["--gradient_checkpointing", "true"]
    assert train(inputs, tmp_path / "run", policy_path, *options) == 0
    assert len(seen) == 2 and any(True in flags for flags in seen)


def test_stored_candidates_stand_beside_fresh_ones(policy_path, tmp_path):
    online_runs.write_inputs(tmp_path, stored=True)
    options = ["--online_stored", "2", "--online_perplexity", "false"]
    assert train(tmp_path, tmp_path / "run", policy_path, *options) == 0
    for own in rounds_of(tmp_path / "run")[0].candidates:
        stored = [i for i, fresh in enumerate(own.fresh) if not fresh]
        kept = {own.responses[i]: own.rewards[i] for i in stored}
        # The best and the worst; what has no score yet counts as worst and is rewarded now.
        assert set(kept) == {"stored bb", "stored ccc" if own.index > 0 else "stored a"}
        assert kept["stored bb"] == pytest.approx(2 - 9 / 20)
        assert kept.get("stored ccc", 0.0) == own.index
        assert all(own.ended[i] for i in stored)
    rows = [row for row in logged(tmp_path / "run") if "online/round" in row]
    assert rows and not any("online/perplexity" in row or "online/kl" in row for row in rows)


def test_losses_with_a_reference_get_its_scores(policy_path, inputs, tmp_path, capsys):
    options = ["--loss", "dpo", "--online_perplexity", "false"]
    assert train(inputs, tmp_path / "run", policy_path, *options) == 0
    first = next(row for row in logged(tmp_path / "run") if "rank_loss" in row)
    own = rounds_of(tmp_path / "run")[0]
    # Policy and reference are one model at the first step, so every strict pair costs log 2, and
    # the step's four prompts have a whole number of them.
    pairs = first["rank_loss"] * 4 / math.log(2)
    assert first["step"] == 1 and pairs >= 4
    assert pairs == pytest.approx(round(pairs), abs=1e-3)
    assert len(own.candidates) == 9


def test_a_model_that_says_nothing_stops_the_run(inputs, tmp_path, capsys):
    silent = tiny_models.save_silent_model(tmp_path / "silent")
    options = ["--shared_prompts", "true"]
    assert train(inputs, tmp_path / "run", silent, *options) == 1
    error = capsys.readouterr().err
    assert "none of the 4 prompts of a step has a response that is not empty" in error
    assert rounds_of(tmp_path / "run")[0].empty == 36


@pytest.mark.parametrize(
    "more", [["--use_peft"], ["--backprop", "two_phase"], ["--shared_prompts", "false"]]
)
def test_other_ways_of_training_go_online_too(policy_path, inputs, tmp_path, more):
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text('{"prompt": "go", "responses": ["ab", "cde"], "scores": [1, 0]}\n')
    options = ["--eval_data", str(ranked), "--learning_rate", "1e-2"]
    assert train(inputs, tmp_path / "run", policy_path, *options, *more) == 0
    second = rounds_of(tmp_path / "run")[1]
    # What samples and what is scored is the model with all that training changed.
    assert max(abs(k) for own in second.candidates for k in own.log_ratios) > 1e-2
    evaluated = [row["step"] for row in logged(tmp_path / "run") if "eval_rank_loss" in row]
    assert evaluated[0] == 0 and evaluated[-1] == online_runs.STEPS


def three_candidates(*responses: str) -> RoundCandidates:
    return RoundCandidates(
        index=0,
        responses=list(responses),
        ended=[True, False, True],
        fresh=[True, True, False],
        rewards=[1.0, 3.0, 100.0],
        scores=[1.0, 3.0, 100.0],
        log_ratios=[0.5, 1.5, 50.0],
        reference_logprobs=[-2.0, -4.0, -99.0],
        num_tokens=[1, 2, 7],
    )


def test_a_round_is_read_as_it_was_written(tmp_path):
    own = three_candidates("one\ntwo\r\n", "line\u2028separator\x85", "\x1c\u2029 end")
    item = PromptItem(tmp_path, "prompt\u2028", [], [], [], [])  # type: ignore[arg-type]
    for given in (Round(3, 12, [own], duplicates=2, empty=1), Round(0, 0, [])):
        given.write(tmp_path / "round.jsonl", [item])
        assert Round.read(tmp_path / "round.jsonl") == given


def test_metrics_of_a_round_count_fresh_responses_only():
    own = three_candidates("a", "b", "c")
    values = round_metrics(Round(3, 12, [own], duplicates=2), with_reference=True)
    assert values["online/reward"] == 2.0 and values["online/reward_std"] == 1.0
    assert values["online/kl"] == 1.0 and values["online/perplexity"] == pytest.approx(math.e**2)
    assert values["online/ended"] == 0.5 and values["online/response_tokens"] == 1.5
    assert values["online/duplicates"] == 2
    assert "online/reward" not in round_metrics(Round(0, 0, []), with_reference=True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--online_every", "0"], "online_every must be at least 1, got 0"),
        (["--data", "x.jsonl"], "--data does not go with --online_every"),
        (["--kl_weight", "-1"], "kl_weight must be at least 0"),
        (["--reward", "absent.py:f"], "absent.py: no such reward file"),
        (["--online_prompts", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--reference_model", "./absent"], "./absent: no such model folder"),
        (["--max_tokens", "20"], "4 responses of 6 tokens may take"),
        (["--dataloader_num_workers", "1"], "dataloader_num_workers must be 0"),
        (["--auto_find_pack_size", "true"], "auto_find_pack_size cannot try packs"),
        (["--online_max_new_tokens", "128"], "max_new_tokens must be below the model's context"),
    ],
)
def test_wrong_options_are_one_line(policy_path, inputs, tmp_path, capsys, more, said):
    assert train(inputs, tmp_path / "run", policy_path, *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_online_options_need_online_training(policy_path, inputs, capsys):
    for option in (["--kl_weight", "0.1"], ["--online_prompts", "x"], ["--reward", "x.py:f"]):
        assert main(["train", *option]) == 2
        assert "belongs to online training" in capsys.readouterr().err
    assert main(["train", "--model", str(policy_path), "--online_every", "3"]) == 2
    assert "--online_every needs --online_prompts" in capsys.readouterr().err


def test_stored_candidates_that_are_messages_are_one_line(
    policy_path, inputs, write_rows, tmp_path, capsys
):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    data = write_rows([{"prompt": "q", "responses": ["a", call]}])
    assert train(inputs, tmp_path / "run", policy_path, "--online_prompts", str(data)) == 2
    error = capsys.readouterr().err
    assert "response 2 is a message with tool_calls, and online training takes texts" in error
    assert error.count("\n") == 1
