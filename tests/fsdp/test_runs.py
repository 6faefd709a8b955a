"""Whole runs of the fsdp backend: what they leave behind, count, save and agree on."""

from functools import partial

import jobs
import pytest
import torch
from recipes import RECIPES, Halves, Methods, Muon, Wgan, by_hand, by_xtrain
from test_recipes import same_as_by_hand

from xtrain import ConfigurationError, ProtocolError
from xtrain.testing.ranks import Ranks


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def close(received, expected):
    for name, value in expected.items():
        torch.testing.assert_close(received[name], value, atol=5e-6, rtol=1e-5)


def test_a_run_leaves_a_plain_module_which_runs_again(pair):
    parameters, kinds, same = pair.run(jobs.fit_twice, 60.0)[0]
    assert same
    assert not [kind for kind in kinds if "FSDP" in kind or "DTensor" in kind]

    assert all(torch.isfinite(value).all() for value in parameters.values())


def test_every_rank_starts_with_the_parameters_of_rank_0(pair):
    close(pair.run(jobs.start_apart, 60.0)[1], by_hand(jobs.Frozen)[0])


@pytest.mark.parametrize(
    ("make", "shard", "groups"),
    [(jobs.Counted, "layers", 6), (jobs.Counted, "children", 2), (Halves, "layers", 3), (Halves, "children", 1)],
)
def test_one_reduction_per_group_and_step(pair, make, shard, groups):
    counts = pair.run(partial(jobs.count_reductions, make, {"shard": shard}), 60.0)
    assert counts == [groups * 4] * 2


@pytest.mark.parametrize("reduce", ["finalize", "backward"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_muon_and_adamw_in_one_layer_share_one_loss_and_one_clip(pair, reduce, accumulate):
    flags = {"accumulate_grad_batches": accumulate}
    received = pair.run(partial(jobs.share_one_loss, {"reduce": reduce}, flags), 60.0)
    close(received[0], jobs.share_one_loss_by_hand(accumulate))


@pytest.mark.parametrize("reduce", ["finalize", "backward"])
def test_a_loss_scale_is_taken_off_each_of_two_optimizers_in_one_layer(pair, reduce):
    flags = {"precision": "16-mixed", "scaler_kwargs": {"init_scale": 1024.0}}
    received = pair.run(partial(jobs.share_one_loss, {"reduce": reduce}, flags), 60.0)
    for name, value in jobs.share_one_loss_by_hand(1).items():
        torch.testing.assert_close(received[0][name], value, atol=2e-2, rtol=2e-2)


def test_saved_on_two_ranks_continues_on_one_and_on_four(pair, four):
    saved = pair.run(partial(jobs.save, "fsdp"), 60.0)
    assert set(saved[1]) == {"gradients"}
    expected, _ = by_hand(jobs.Longer)
    for place in (partial(jobs.resume, "cpu", saved, world_size=1, rank=0), None):
        outcomes = [place()] if place else four.run(partial(jobs.resume, "fsdp", saved), 60.0)
        close(outcomes[0], expected)


def test_saved_on_the_cpu_continues_in_shards(pair):
    saved = [jobs.save("cpu", 1, 0)]
    expected, _ = by_hand(jobs.Longer)
    close(pair.run(partial(jobs.resume, "fsdp", saved), 60.0)[0], expected)


def test_a_loss_may_reach_a_layer_on_one_rank_only(pair):
    same_as_by_hand(pair, jobs.OnSomeRanks, {})


def test_or_is_refused_where_each_backward_reduces(pair):
    with pytest.raises(ProtocolError, match=r"reaches b.0, b.2, b.4 on some ranks only.\nFix:  FSDP\("):
        pair.run(partial(by_xtrain, jobs.OnSomeRanks, {"reduce": "backward"}), 60.0)


def test_a_layer_that_some_ranks_never_call_is_an_error_on_all(pair):
    with pytest.raises(ProtocolError, match=r"gather b.0.*run a backward|run a backward.*gather b.0"):
        pair.run(partial(jobs.call_on_some_ranks, {}), 60.0)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "Wgan"])
def test_reduced_in_each_backward(pair, recipe):
    same_as_by_hand(pair, RECIPES[recipe], {"reduce": "backward"})


def test_a_gradient_of_a_gradient_is_refused_where_each_backward_reduces(pair):
    with pytest.raises(ProtocolError, match=r"create_graph=True through b.*\nFix:  FSDP\(reduce='finalize'"):
        pair.run(partial(by_xtrain, Wgan, {"reduce": "backward"}), 60.0)


@pytest.mark.parametrize(("reduce", "count"), [("finalize", 2 * 4), ("backward", 2 * 4 * 4)])
def test_reductions_by_mode(pair, reduce, count):
    options = {"reduce": reduce, "shard": "children"}
    assert pair.run(partial(jobs.count_reductions, jobs.Counted, options), 60.0) == [count] * 2


def test_another_method_is_told_with_the_line_that_registers_it(pair):
    with pytest.raises(ConfigurationError, match=r"shards in a.encode.*\nFix:  FSDP\(methods=\['a.encode'\]\)"):
        pair.run(partial(by_xtrain, Methods, {}), 60.0)


def test_whole_parameters_can_be_read_and_written(pair):
    shards, same, written, after = pair.run(jobs.look, 60.0)[0]
    assert shards["0.weight"] == (5, 5)
    assert same
    assert written == after == [3.0]


@pytest.mark.parametrize(
    "options", [{"mesh": {"data": 2, "fsdp": 2}}, {"replicate": 2}, {"mesh": {"data": 4}}, {"offload": "cpu"}, {}]
)
def test_meshes_and_offload(four, options):
    same_as_by_hand(four, Wgan, options)
    same_as_by_hand(four, Muon, options)


def test_more_ranks_than_rows(four):
    same_as_by_hand(four, jobs.Wide, {})


def test_mixed_policy_from_a_frozen_start(pair):
    options = {"mixed": {"param": "bfloat16", "reduce": "float32"}}
    (parameters, _), _ = pair.run(partial(by_xtrain, jobs.Frozen, options), 60.0)
    expected, _ = by_hand(jobs.Frozen)
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, atol=2e-3, rtol=2e-2)
    assert parameters["a.0.weight"].dtype is torch.float32


LOOKS = [jobs.clip_by_torch, jobs.clip_values_by_torch, jobs.norm_by_torch, jobs.drop_by_module, jobs.write_by_hand]


@pytest.mark.parametrize("look", LOOKS)
def test_gradients_that_wait_for_their_reduction_are_not_read_or_written(pair, look):
    for said, alone in pair.run(partial(jobs.look_early, look, None, {}), 60.0):
        assert "Expected gradients to be used after their reduction. Received: a.0.weight.grad in " in said
        assert "Fix:  self.clip_gradients(opt, gradient_clip_val=1.0)" in said
        assert "opt.finalize(), then: " in said
        assert alone


@pytest.mark.parametrize(
    ("look", "before", "options"),
    [
        (jobs.clip_by_torch, jobs.finalize, {}),
        (jobs.clip_values_by_torch, jobs.finalize, {}),
        (jobs.clip_by_torch, None, {"reduce": "backward"}),
        (jobs.copy_parameters, None, {}),
    ],
)
def test_what_is_right_before_the_step_is_let_pass(pair, look, before, options):
    for received, alone in pair.run(partial(jobs.look_early, look, before, options), 60.0):
        close(received, jobs.look_early_by_hand(look))
        assert alone


USES = [jobs.clip_kept, jobs.decay_kept, jobs.count_kept, jobs.freeze_kept, jobs.drop_kept, jobs.average_kept]


@pytest.mark.parametrize("use", USES)
def test_parameters_kept_from_before_they_were_sharded_are_not_used_in_silence(pair, use):
    for said, plain_again in pair.run(partial(jobs.use_kept, use), 60.0):
        assert "Received: a.0.weight as it was before it was sharded, in " in said
        assert "self.net.parameters(), no list kept in __init__" in said
        assert plain_again
