"""Listeners of a student's evaluations, and the schedule that they and the operators ask."""

import copy

import pytest
import torch
from small_models import config, denoiser, noise, run, student

import modiff
from modiff import Modulation
from modiff.trajectory.identity import KeptOutput
from modiff.trajectory.listeners import Listener
from modiff.trajectory.schedule import Answer, Schedule
from modiff.trajectory.session import state_of


class Diary(Listener):
    def __init__(self):
        self.entries = []

    def before_evaluation(self, state, arguments):
        self.entries.append(("before", state.evaluation, len(arguments)))

    def after_evaluation(self, state, output):
        self.entries.append(("after", state.evaluation, output.shape[0]))

    def closed(self, state):
        self.entries.append("closed")

    def moved(self, state):
        self.entries.append("moved")

    def removed(self, state):
        self.entries.append("removed")


def test_listeners_are_told_of_each_evaluation_and_of_the_end():
    model, diary = student(), Diary()
    state_of(model).listeners.append(diary)
    run(model, noise(2))
    assert diary.entries == [("before", 0, 2), ("after", 0, 2), ("before", 1, 2), ("after", 1, 2), "closed"]
    diary.entries.clear()
    model.to(torch.float32)
    assert set(diary.entries) == {"moved"}
    modiff.restore(model)
    assert diary.entries[-1] == "removed"


def test_outside_of_a_trajectory_only_the_beginning_is_told():
    model, diary = modiff.quantize(denoiser(), config("w8a4-ptq-paper")), Diary()
    state_of(model).listeners.append(diary)
    with torch.no_grad():
        model(*noise(1)[0])
    assert diary.entries == [("before", 0, 2)]


def test_copies_have_their_own_listeners_and_only_those_that_are_to_be_copied():
    model, diary = student(), Diary()
    state_of(model).listeners.append(diary)
    kept = state_of(copy.deepcopy(model)).listeners
    assert kept
    assert not any(isinstance(listener, Diary) for listener in kept)
    assert not any(listener is other for listener in kept for other in state_of(model).listeners)


@pytest.mark.parametrize(
    ("evaluation", "modulation", "answer"),
    [
        (0, Modulation(), Answer.COMPUTE),
        (0, Modulation(warmup="refine"), Answer.REFINE),
        (1, Modulation(refresh_every=2), Answer.ADVANCE),
        (2, Modulation(refresh_every=2), Answer.COMPUTE),
        (2, Modulation(warmup="refine", refresh_every=2), Answer.COMPUTE),
        (3, Modulation(), Answer.ADVANCE),
    ],
)
def test_what_a_call_does(evaluation, modulation, answer):
    model, (args, other) = student(), noise(2)
    with modiff.trajectory(model) as counts:
        model(*args)
        cache = counts.caches["conv_in"][0]
        schedule = Schedule()
        found = schedule.operator(evaluation, None if evaluation == 0 else cache, other[0], modulation)
        assert found is answer
        assert schedule.operator(5, cache, args[0], modulation) is Answer.REUSE
        assert schedule.traced(cache, [other[0], args[0]]) is Answer.REUSE
        assert schedule.traced(cache, [other[0]]) is Answer.ADVANCE


def test_a_kept_output_is_given_again_while_nobody_wrote():
    schedule, x, y = Schedule(), torch.ones(2), torch.zeros(2)
    kept = KeptOutput.of(x, y)
    assert schedule.module(kept, x, torch.zeros(2)) is Answer.REUSE
    assert schedule.module(kept, x.clone(), torch.zeros(2)) is Answer.COMPUTE
    assert schedule.module(kept, x, torch.zeros(3)) is Answer.COMPUTE
    y.add_(1)
    assert schedule.module(kept, x, torch.zeros(2)) is Answer.COMPUTE
    assert schedule.module(None, x, y) is Answer.COMPUTE
