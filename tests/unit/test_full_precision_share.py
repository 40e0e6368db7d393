"""What modiff cannot quantize is named with its share of the work, as soon as shapes are known, and once."""

from __future__ import annotations

import logging

import pipelines
import pytest
import torch
from small_models import tiny_unet
from torch import nn

import modiff
from modiff import QuantConfig, Rule
from modiff.errors import ConfigError
from modiff.student.example import empty_copy, example_of
from modiff.student.match import plans
from modiff.student.share import macs_beforehand


class Doubled(nn.Conv2d):
    """A convolution with code of its own, which modiff leaves alone."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(2 * input)


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
TEXT = (
    "90 % of the multiply-accumulates of this student stay in full precision, because modiff cannot quantize these "
    "modules: '1' (90%). modiff.describe(student) says why."
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), Doubled(4, 4, 3, padding=1))


def messages(caplog) -> list[str]:
    return [record.message for record in caplog.records if "full precision" in record.message]


def run(student: nn.Module, *args: torch.Tensor) -> None:
    with modiff.trajectory(student):
        for _ in range(2):
            student(*args)


@pytest.mark.parametrize("example", [(X,), [X], X, {"input": X}])
@pytest.mark.parametrize("preset", ["w8a8-modiff", "w8a8-ptq-paper"])
def test_quantize_warns_at_once_where_it_has_an_example(caplog, preset, example) -> None:
    with caplog.at_level(logging.WARNING, "modiff"):
        student = modiff.quantize(model(), preset, example_inputs=example)
        assert messages(caplog) == [TEXT]
        run(student, X)
    assert messages(caplog) == [TEXT]
    assert "90.0% of the multiply-accumulates in full precision" in str(modiff.cost(student, X))


def test_it_warns_in_the_first_evaluation_without(caplog) -> None:
    with caplog.at_level(logging.WARNING, "modiff"):
        student = modiff.quantize(model(), "w8a8-modiff")
        assert not messages(caplog)
        run(student, X)
        run(student, X)
    assert messages(caplog) == [TEXT]


def test_what_a_rule_skips_is_no_surprise(caplog) -> None:
    base = QuantConfig.preset("w8a8-ptq-paper")
    first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
    config = QuantConfig(base.weight, base.activation, None, (Rule("1", skip=True),))
    with caplog.at_level(logging.WARNING, "modiff"):
        run(modiff.quantize(first, config, example_inputs=(X,)), X)
    assert not messages(caplog)


def test_an_example_that_does_not_fit_is_refused_before_anything_is_quantized() -> None:
    net = model()
    with pytest.raises(ConfigError, match=r"cannot be called with example_inputs .* Give the arguments of its forward"):
        modiff.quantize(net, "w8a8-ptq-paper", example_inputs=(X[:, :3],))
    assert type(net[0]) is nn.Conv2d


def patch(unet: nn.Module) -> nn.Module:
    """Give convolutions of the middle code of their own."""
    for resnet in unet.mid_block.resnets:
        resnet.conv1.__class__ = resnet.conv2.__class__ = Doubled
    return unet


def test_diffusers_networks_are_known_by_their_configuration(caplog) -> None:
    unet = patch(tiny_unet())
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    random = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "modiff"):
        student = modiff.quantize(unet, "w8a8-modiff")
        (said,) = messages(caplog)
        assert "'mid_block.resnets.0.conv1' (" in said
        run(student, torch.zeros(1, 1, 8, 8), torch.tensor(3))
    assert messages(caplog) == [said]
    assert torch.equal(torch.get_rng_state(), random)
    restored = modiff.restore(student).state_dict()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in state.items())


def test_quantize_pipeline_warns_at_once(caplog) -> None:
    pipe, _ = pipelines.build(pipelines.stable_diffusion)
    patch(pipe.unet)
    with caplog.at_level(logging.WARNING, "modiff"):
        modiff.quantize_pipeline(pipe, "w8a8-ptq")
    assert "'mid_block.resnets.0.conv1' (" in messages(caplog)[0]


@pytest.mark.parametrize("builder", [b for b in pipelines.BUILDERS if b is not pipelines.flux])
def test_the_example_of_a_pipelines_denoiser_fits_it(builder) -> None:
    pipe, _ = pipelines.build(builder)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    example = example_of(denoiser)
    assert example is not None
    with torch.device("meta"), torch.no_grad():
        empty_copy(denoiser)(**example)
    assert not any(parameter.is_meta for parameter in denoiser.parameters())


def test_the_share_is_the_one_of_a_real_evaluation() -> None:
    unet = patch(tiny_unet())
    found = plans(unet, QuantConfig.preset("w8a8-ptq"))
    real = macs_beforehand(unet, found, (torch.zeros(1, 1, 8, 8), torch.tensor(3)))
    assert sum(real.values()) > 100_000
    assert macs_beforehand(unet, found, None) == real


def test_images_of_any_size_are_not_guessed() -> None:
    pipe, _ = pipelines.build(pipelines.flux)
    assert example_of(pipe.transformer) is None
    assert example_of(model()) is None
