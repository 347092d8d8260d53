"""Reference scores: right, computed once, and computed again when anything they rest on changes."""

from __future__ import annotations

import pytest
import reference_processes as worker
import tiny_models
import torch
import torch.multiprocessing as mp
from damaging import DAMAGES, damage_file
from pack_cases import separate_scores
from torch import nn
from transformers import AutoModelForCausalLM

from fastrank.data.packing import Group
from fastrank.errors import InputError
from fastrank.modeling import reference_scores
from fastrank.modeling.reference_scores import with_reference_scores


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_scores_are_the_models_log_probabilities(policy_path, normalize):
    groups = worker.make_groups()
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = separate_scores(model, groups)
    if normalize == "sum":
        expected = expected * torch.tensor([len(r) for g in groups for r in g.response_ids])
    found = with_reference_scores(groups, policy_path, normalize=normalize)
    scores = torch.cat([group.reference_scores for group in found])
    torch.testing.assert_close(scores, expected.float(), atol=1e-4, rtol=1e-5)
    for group, new in zip(groups, found, strict=True):
        assert torch.equal(new.prompt_ids, group.prompt_ids)
        assert torch.equal(new.rewards, group.rewards)
    assert len(found) == 7 and len(found[2:5]) == 3
    assert torch.equal(found[-1].reference_scores, found[6].reference_scores)
    turned = found.select([5, 0, 3])[1:]
    for got, row in zip(turned, (0, 3), strict=True):
        assert torch.equal(got.reference_scores, found[row].reference_scores)
        assert torch.equal(got.prompt_ids, groups[row].prompt_ids)
    assert turned.sizes.num_candidates.tolist() == [1, 4]


def test_a_loaded_model_is_asked_as_it_is_and_released(policy_path):
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    before = dict(model.__dict__)
    groups = worker.make_groups()
    found = with_reference_scores(groups, model, normalize="sum")
    expected = with_reference_scores(groups, policy_path, normalize="sum")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.reference_scores, b.reference_scores)
    assert set(model.__dict__) == set(before)


def test_a_second_run_reads_the_scores_and_loads_no_model(policy_path, tmp_path, monkeypatch):
    groups = worker.make_groups()
    first = with_reference_scores(groups, policy_path, normalize="sum", cache_dir=tmp_path)

    def fails(*arguments, **options):
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(reference_scores, "load_model", fails)
    again = with_reference_scores(groups, policy_path, normalize="sum", cache_dir=tmp_path)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.reference_scores, b.reference_scores)
    for changed in (groups[:-1], groups[::-1]):
        with pytest.raises(AssertionError, match="loaded again"):
            with_reference_scores(changed, policy_path, normalize="sum", cache_dir=tmp_path)
    with pytest.raises(AssertionError, match="loaded again"):
        with_reference_scores(groups, policy_path, normalize="mean", cache_dir=tmp_path)


def test_a_model_trained_on_in_its_folder_is_asked_again(tmp_path):
    path = tiny_models.save_llama(tmp_path / "model")
    groups = worker.make_groups()
    cache = tmp_path / "cache"
    before = with_reference_scores(groups, path, normalize="sum", cache_dir=cache)
    tiny_models.save_llama(path, seed=5)
    after = with_reference_scores(groups, path, normalize="sum", cache_dir=cache)
    assert not torch.allclose(before[3].reference_scores, after[3].reference_scores)
    assert len(list(cache.iterdir())) == 2


def test_whatever_is_damaged_in_the_kept_scores_they_are_made_again(
    policy_path, tmp_path, monkeypatch, caplog
):
    groups = worker.make_groups()
    first = with_reference_scores(groups, policy_path, normalize="sum", cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    made = []

    def scored(*args):
        made.append(args)
        return first.reference_scores

    monkeypatch.setattr(reference_scores, "_score", scored)
    monkeypatch.setattr(reference_scores, "load_model", lambda *args, **options: nn.Identity())
    for number, kind in enumerate(DAMAGES, start=1):
        damage_file(file, kind)
        caplog.clear()
        again = with_reference_scores(groups, policy_path, normalize="sum", cache_dir=tmp_path)
        assert torch.equal(first.reference_scores, again.reference_scores)
        assert len(made) == number, kind
        assert caplog.messages == [f"{file} is damaged: the reference model is asked again"]
        assert file.read_bytes() == whole


def test_tokens_of_another_tokenizer_are_one_line(policy_path):
    group = Group([1, 5000], ([3, 4],), [1.0], name="data.jsonl:3")
    with pytest.raises(InputError, match="as reference model: data.jsonl:3: token ids must lie"):
        with_reference_scores([group], policy_path, normalize="sum")


def test_two_processes_share_the_work_and_agree(policy_path, tmp_path):
    # Forked: processes of their own would spend their time importing.
    arguments = (2, str(tmp_path), str(policy_path))
    mp.start_processes(worker.run, arguments, nprocs=2, start_method="fork")
    expected = with_reference_scores(worker.make_groups(), policy_path, normalize="sum")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for scores, group in zip(found, expected, strict=True):
            torch.testing.assert_close(scores, group.reference_scores, atol=1e-5, rtol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 1
