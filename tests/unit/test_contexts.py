"""Guidance: calls with a state of their own, batches that halve, and what is counted."""

import pytest
import torch
from small_models import noise, run, student

import modiff
from modiff.errors import ConfigError, TrajectoryError

COND, UNCOND = noise(5, seed=3), noise(5, seed=7)


def two_calls(model, **options):
    """Outputs of both calls of five steps, and the counts."""
    outputs = {"cond": [], "uncond": []}
    with modiff.trajectory(model, **options) as counts:
        for pair in zip(UNCOND, COND, strict=True):
            for name, args in zip(("uncond", "cond"), pair, strict=True):
                if options:
                    outputs[name].append(model(*args))
                else:
                    with counts.context(name):
                        outputs[name].append(model(*args))
    return outputs, counts


@pytest.mark.parametrize("options", [{}, {"contexts": ("uncond", "cond")}], ids=["named", "in order"])
@pytest.mark.parametrize("modulation", [{}, {"warmup": "refine"}, {"refresh_every": 3}])
def test_each_context_is_a_trajectory_of_its_own(options, modulation):
    outputs, counts = two_calls(student(**modulation), **options)
    for name, inputs in (("cond", COND), ("uncond", UNCOND)):
        expected, alone = run(student(**modulation), inputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs[name], expected, strict=True))
        assert (counts.contexts[name].total, counts.contexts[name].quantized) == (alone.total, alone.quantized)
    assert (counts.total, counts.quantized) == (10, 2 * alone.quantized)


def test_one_state_for_both_calls_gives_other_images():
    """What contexts are for: the residual is then the difference of the two calls, not of two steps."""
    model, outputs = student(), []
    with modiff.trajectory(model) as counts:
        for pair in zip(UNCOND, COND, strict=True):
            outputs += [model(*args) for args in pair]
    assert (counts.total, counts.quantized) == (10, 9)
    assert not torch.equal(outputs[-1], two_calls(student())[0]["cond"][-1])


def test_one_context_may_end_before_the_other():
    model = student()
    with modiff.trajectory(model) as counts:
        for i, (unconditional, conditional) in enumerate(zip(UNCOND, COND, strict=True)):
            if i < 2:
                with counts.context("uncond"):
                    model(*unconditional)
            with counts.context("cond"):
                last = model(*conditional)
    assert torch.equal(last, run(student(), COND)[0][-1])
    assert {c.name: (c.total, c.quantized) for c in counts.contexts.values()} == {"uncond": (2, 1), "cond": (5, 4)}
    assert (counts.total, counts.quantized) == (7, 5)


def test_contexts_may_differ_in_batch_and_both_states_are_counted_and_freed():
    model = student()
    with modiff.trajectory(model) as counts:
        with counts.context("a"):
            model(*noise(1)[0])
        one = counts.state_bytes
        with counts.context("b"):
            model(*noise(1, batch=4)[0])
        assert counts.state_bytes == 3 * one
    assert counts.state_bytes == 0


def test_the_message_names_the_context():
    model = student()
    with modiff.trajectory(model) as counts, counts.context("cond"):
        model(*noise(1)[0])
        with pytest.raises(TrajectoryError, match="in evaluation 1 of context 'cond', but had"):
            model(*noise(1, batch=3)[0])


def test_contexts_nest_and_end():
    model, args = student(), noise(1)[0]
    with modiff.trajectory(model) as counts:
        with counts.context("a"):
            with counts.context("b"):
                model(*args)
            model(*args)
        model(*args)
    assert {name: context.total for name, context in counts.contexts.items()} == {"a": 1, "b": 1, "": 1}
    with pytest.raises(TrajectoryError, match="The trajectory is closed; .* Open a new"), counts.context("a"):
        pass


def test_a_context_within_an_evaluation_is_refused():
    model = student()
    with modiff.trajectory(model) as counts:
        model.norm.register_forward_hook(lambda *_: counts.context("cond").__enter__())
        with pytest.raises(TrajectoryError, match="'cond' was entered within an evaluation; enter it around the call"):
            model(*noise(1)[0])


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_context_needs_a_name(name):
    with (
        modiff.trajectory(student()) as counts,
        pytest.raises(ConfigError, match="The context is .*; give a name, such as 'cond'"),
        counts.context(name),
    ):
        pass


@pytest.mark.parametrize("names", ["cond", (), ("a", "a"), ("a", ""), (1, 2)])
def test_contexts_are_different_names(names):
    with (
        pytest.raises(ConfigError, match=r"contexts is .*; give the names of a step's denoiser calls in their order"),
        modiff.trajectory(student(), contexts=names),
    ):
        pass


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a8-modiff"])
@pytest.mark.parametrize("modulation", [{}, {"state_dtype": "float16"}])
def test_a_batch_whose_guidance_ends_goes_on_with_its_last_half(preset, modulation):
    both = [tuple(torch.cat(parts) for parts in zip(u, c, strict=True)) for u, c in zip(UNCOND, COND, strict=True)]
    model = student(preset, **modulation)
    with modiff.trajectory(model, guidance_may_end=True) as counts:
        outputs = [model(*args) for args in [*both[:3], *COND[3:]]]
        assert counts.caches["conv_in"][0].a_hat.shape[0] == 2
    alone, _ = run(student(preset, **modulation), COND)
    for a, b in zip(outputs, alone, strict=True):
        torch.testing.assert_close(a[-2:], b, rtol=1e-4, atol=1e-4)  # products of other batches round differently
    assert (counts.total, counts.quantized) == (5, 4)


def test_a_batch_that_halves_is_refused_unless_allowed():
    model = student()
    with modiff.trajectory(model):
        model(*noise(1, batch=4)[0])
        with pytest.raises(TrajectoryError, match="Where guidance in one batch switches off.*guidance_may_end=True"):
            model(*noise(1, batch=2)[0])


@pytest.mark.parametrize("batches", [(4, 3), (2, 6), (3, 1)])
def test_other_changes_of_the_batch_are_refused_all_the_same(batches):
    model = student()
    with modiff.trajectory(model, guidance_may_end=True):
        model(*noise(1, batch=batches[0])[0])
        with pytest.raises(TrajectoryError, match="Keep the batch through a trajectory"):
            model(*noise(1, batch=batches[1])[0])
