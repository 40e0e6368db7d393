"""Architectures at full size with random weights."""

from __future__ import annotations

import pytest
import torch

from modiff.errors import ConfigError
from modiff.teachers.architectures import random_denoiser
from modiff.teachers.zoo import TeacherSpec, load_teacher


def test_packaged_architecture_without_its_weights() -> None:
    real, random = load_teacher(TeacherSpec("mnist")), load_teacher(TeacherSpec("mnist", random=True))
    shapes = [{k: v.shape for k, v in t.denoiser.state_dict().items()} for t in (real, random)]
    assert shapes[0] == shapes[1]
    assert random.sample_shape == real.sample_shape
    assert random.fingerprint != real.fingerprint
    assert not torch.equal(real.denoiser.conv_in.weight, random.denoiser.conv_in.weight)
    assert TeacherSpec("mnist", random=True).title == "mnist (random weights)"
    assert TeacherSpec("mnist", random=True).entry.features is None


def test_random_weights_are_the_same_every_time_and_touch_no_global_state(tiny_teacher) -> None:
    spec = TeacherSpec("mnist", str(tiny_teacher), random=True)
    before = torch.get_rng_state()
    first, second = (load_teacher(spec).denoiser.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["conv_in.weight"].shape == (8, 1, 3, 3)  # the folder's architecture, not the name's


def test_architecture_that_is_not_known_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"needs the architecture of teacher 'flux-dev \(random weights\)', which is "
    ):
        load_teacher(TeacherSpec("flux-dev", random=True))


def test_class_that_diffusers_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"names the class 'Nothing', which diffusers does not have. Correct"):
        random_denoiser("mine", {"_class_name": "Nothing"})


def test_tiny_and_random_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"teacher.tiny and model.teacher.random are both given. Remove one"):
        TeacherSpec("mnist", tiny=True, random=True)
