"""``modiff search``: goals, space, study and files, on a target whose answers are known."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from modiff.config.quant import QuantConfig
from modiff.errors import ConfigError
from modiff.lit.search.frontier import recipe_of, sentences, slug, write_frontier
from modiff.lit.search.goals import Quality, parse_budget, parse_cost
from modiff.lit.search.page import write_page
from modiff.lit.search.space import SearchSpace, Setting
from modiff.lit.search.study import Search, cheapest, nearest, pareto
from modiff.lit.search.target import Measured

SPACE = SearchSpace(
    samplers=("ddim",), steps=(5, 10, 20), weight_bits=(8,), activation_bits=(32, 8, 4), schedules=("none",)
)
ABOUT = {
    "teacher": {"name": "mnist"},
    "seed": 0,
    "reference": {"sampler": "ddim", "steps": 100},
    "command": "modiff search",
}


class Known:
    """A target whose error is .1 / steps + .05 / 2^bits, and whose cost is steps x bits."""

    def __init__(self, fingerprint: str = "known", stop_after: int | None = None, seed: int = 0) -> None:
        self.fingerprint = fingerprint
        self.noise = {"seed": seed}
        self.stop_after = stop_after
        self.drawn: list[tuple[Setting, int]] = []

    def converged(self, sampler: str, steps: int, count: int) -> torch.Tensor:
        return torch.full((count, 1, 4, 4), 0.01 / steps)

    def measure(self, setting: Setting, count: int) -> Measured:
        if self.stop_after is not None and len(self.drawn) >= self.stop_after:
            raise KeyboardInterrupt
        self.drawn.append((setting, count))
        error = 0.1 / setting.steps + 0.05 / 2 ** min(setting.activation_bits, 8)
        bits = setting.weight_bits * setting.activation_bits
        price = float(setting.steps * bits)
        return Measured(torch.full((count, 1, 4, 4), error), price / 100, 0.01, price, 1.0, setting.steps)


def make(folder, target=None, quality="psnr_db >= 40", **kwargs):
    given = {"space": SPACE, "cost": "gbops", "images": 2, "confirm_images": 4, "reference_steps": 100, **kwargs}
    return Search(target or Known(), quality=Quality.parse(quality), folder=folder, say=lambda line: None, **given)


def test_exhausts_a_small_space_and_finds_its_cheapest_setting(tmp_path):
    target = Known()
    points = make(tmp_path, target).run(600)
    assert {p.setting for p in points} == {Setting("ddim", s, 8, a) for s in (5, 10, 20) for a in (32, 8, 4)}
    assert len(target.drawn) == len(set(target.drawn)), "nothing is measured twice with the same images"
    quality = Quality.parse("psnr_db >= 40")
    best = cheapest(points, quality, "gbops")
    keeps = [p for p in points if p.quality["psnr_db"] >= 40]
    assert best.cost["gbops"] == min(p.cost["gbops"] for p in keeps)
    assert best.images == 4, "the answer is confirmed with more images"


def test_goes_on_after_an_interruption_without_measuring_again(tmp_path):
    first = Known(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, first).run(600)
    second = Known()
    points = make(tmp_path, second).run(600)
    assert len(points) == 9
    assert not set(first.drawn) & set(second.drawn)


def test_two_searches_on_one_folder_share_the_work(tmp_path):
    a, b = Known(), Known()
    one, two = make(tmp_path, a), make(tmp_path, b)
    one.run(600)
    assert len(two.run(600)) == 9
    assert b.drawn == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target": Known("other")}, "made for another teacher"),
        ({"target": Known(seed=1)}, "made with another noise"),
        ({"reference_steps": 50}, "made with another reference"),
        ({"space": SearchSpace(samplers=("ddim",), steps=(5,))}, "made with another space"),
    ],
)
def test_a_study_of_something_else_is_refused(tmp_path, change, match):
    make(tmp_path).run(600)
    with pytest.raises(ConfigError, match=match):
        make(tmp_path, **change).run(600)


def test_an_unconverged_reference_is_refused(tmp_path):
    class Rough(Known):
        def converged(self, sampler, steps, count):
            return torch.full((count, 1, 4, 4), 10.0 / steps)

    with pytest.raises(ConfigError, match="is not converged: psnr_db to half as many steps is"):
        make(tmp_path, Rough(), quality="psnr_db >= 30").run(600)


def test_a_budget_too_short_for_one_trial_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="too short for one trial"):
        make(tmp_path).run(1e-9)


def test_pareto_keeps_what_nothing_beats(tmp_path):
    quality = Quality.parse("psnr_db >= 40")
    points = make(tmp_path).run(600)
    front = pareto(points, quality, "gbops")
    for point in points:
        beaten = any(
            o.cost["gbops"] <= point.cost["gbops"] and o.quality["psnr_db"] >= point.quality["psnr_db"] and o != point
            for o in points
        )
        assert (point in front) != beaten


def test_a_quality_that_nothing_reaches_shows_the_nearest_points(tmp_path):
    quality = Quality.parse("psnr_db >= 59")
    points = make(tmp_path, quality="psnr_db >= 59").run(600)
    assert cheapest(points, quality, "gbops") is None
    said = sentences(points, quality, "gbops")[0]
    assert said.startswith("Nothing reached psnr_db >= 59")
    assert str(nearest(points, quality)[0].setting) in said


def test_files_hold_every_point_and_recipes_are_ready(tmp_path):
    quality = Quality.parse("psnr_db >= 40")
    points = make(tmp_path).run(600)
    result = write_frontier(tmp_path, points, quality, "gbops", ABOUT)
    page = write_page(tmp_path, result).read_text()
    stored = json.loads((tmp_path / "frontier.json").read_text())
    assert len(stored["points"]) == 9
    assert all(str(point.setting) in page for point in points)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "the page needs no network"
    for point in stored["frontier"]:
        recipe = yaml.safe_load((tmp_path / point["recipe"]).read_text())
        assert recipe["model"]["steps"] == point["setting"]["steps"]
        config = recipe["model"]["config"]
        assert QuantConfig.from_dict(config) == Setting(**point["setting"]).config()
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["model"]["scheduler"] == "ddim"


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Quality.parse("psnr_db > 30"), "write a measure and a bound"),
        (lambda: Quality.parse("ssim >= 1"), "names 'ssim', which does not exist; allowed are psnr_db, relative_l2"),
        (lambda: Quality.parse("fid >= 3"), 'bounded by <=: "fid <= 3"'),
        (lambda: Quality.parse("psnr_db <= 30"), 'bounded by >=: "psnr_db >= 30"'),
        (lambda: parse_cost("money"), "cost is 'money'; allowed are time, gbops, memory"),
        (lambda: parse_budget("soon"), "write a duration such as 20m"),
        (lambda: parse_budget("0s"), "longer than nothing"),
        (lambda: SearchSpace(steps=()), "space.steps is \\(\\); give a list"),
        (lambda: SearchSpace(steps=(0,)), "space.steps has 0"),
        (lambda: SearchSpace(weight_bits=(9,)), "space.weight_bits has 9"),
        (lambda: SearchSpace(methods=("magic",)), "space.methods has 'magic'"),
        (lambda: SearchSpace(granularities=("row",)), "space.granularities has 'row'; allowed are preset, tensor"),
        (lambda: SearchSpace(scales=("log",)), "space.scales has 'log'; allowed are preset, real, power_of_two"),
        (
            lambda: SearchSpace(samplers=("ddpm",)).check(Quality.parse("psnr_db >= 30")),
            "'ddpm', which adds noise in every step",
        ),
        (lambda: SearchSpace(schedules=("sometimes",)), "unknown schedule 'sometimes'"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ConfigError, match=match):
        call()


def test_scales_are_part_of_a_setting():
    plain, other = Setting("ddim", 20, 8, 4), Setting("ddim", 20, 8, 4, scales="real")
    assert plain.config().activation.scales == "power_of_two"
    assert other.config().activation.scales == "real"
    assert str(other) == "ddim 20, W8A4 modiff, real scales"
    assert slug(other) == "ddim20_w8a4_modiff_real"


def test_samplers_known_to_add_noise_are_those_that_do():
    from modiff.teachers.sampling.loop import sample
    from modiff.teachers.sampling.schedulers import SAMPLERS, STOCHASTIC, make_scheduler

    for name in SAMPLERS:
        asked = []

        def step_noise(step, asked=asked):
            asked.append(step)
            return torch.zeros(1, 1, 2, 2)

        sample(lambda x, t: 0.1 * x, make_scheduler(name), torch.ones(1, 1, 2, 2), 4, step_noise=step_noise)
        assert bool(asked) == (name in STOCHASTIC), name


def test_distances_compare_samplers_that_add_noise(tmp_path, tiny_teacher, tiny_features):
    """The figure is ImageFidelity's own, and the noise of a step is the image's."""
    from modiff.lit.search.distances import distances_of
    from modiff.lit.search.target import TeacherTarget
    from modiff.metrics.features import load_feature_network
    from modiff.metrics.fidelity import ImageFidelity
    from modiff.teachers.zoo import TeacherSpec, load_teacher

    spec, quality = TeacherSpec(path=str(tiny_teacher)), Quality.parse("fid_to_teacher <= 1e9")
    teacher = load_teacher(spec)
    judge = distances_of(quality, spec, teacher, 40, str(tiny_features), None)
    target = TeacherTarget(teacher, batch_size=20)
    space = SearchSpace(("ddpm", "ddim"), (2, 4), (8,), (32,), schedules=("none",))
    given = {"space": space, "images": 40, "confirm_images": 40, "reference_sampler": "ddim", "reference_steps": 8}
    search = Search(target, quality=quality, cost="gbops", folder=tmp_path, distances=judge, say=print, **given)
    points = search.run(600)
    assert {p.setting.sampler for p in points} == {"ddpm", "ddim"}
    point = next(p for p in points if p.setting.sampler == "ddpm" and p.setting.steps == 4)
    fidelity = ImageFidelity(load_feature_network(str(tiny_features)), None, judge.features)
    fidelity.update(((target.converged("ddim", 8, 40) + 1) / 2).clamp(0, 1), "teacher")
    images = target.measure(point.setting, 40).images
    fidelity.update(((images + 1) / 2).clamp(0, 1), "student")
    assert point.quality["fid_to_teacher"] == pytest.approx(fidelity.compute()["student"]["fid_to_teacher"], rel=1e-6)
    assert "fid" not in point.quality

    fewer = TeacherTarget(teacher, batch_size=5).measure(point.setting, 5).images
    assert torch.allclose(fewer, images[:5], atol=1e-5), "an image does not depend on the batch it is drawn in"
    for asked, images_, match in (
        ("fid <= 3", 40, "no statistics of real images"),
        ("fid_to_teacher <= 3", judge.features, f"features, which {judge.features} images cannot give"),
    ):
        with pytest.raises(ConfigError, match=match):
            distances_of(Quality.parse(asked), spec, teacher, images_, str(tiny_features), None)


def test_settings_that_do_the_same_are_one():
    full = Setting("ddim", 20)
    assert Setting("ddim", 20, activation_bits=32, method="ptq", granularity="channel").canonical() == full
    assert recipe_of(full, {"name": "mnist"})["model"]["config"] is None
    assert slug(Setting("ddim", 20, 8, 6, "ptq", "channel", "reuse-2", True)) == (
        "ddim20_w8a6_ptq_channel_reuse-2_compiled"
    )


def test_a_pipeline_of_ones_own_is_searched_and_left_as_it_was(tmp_path):
    import diffusers

    import modiff

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    pipe = diffusers.DDIMPipeline(unet=unet.eval().requires_grad_(False), scheduler=diffusers.DDIMScheduler())
    scheduler, names = pipe.scheduler, [name for name, _ in pipe.unet.named_modules()]
    space = SearchSpace(
        samplers=("ddim",), steps=(2, 3), weight_bits=(8,), activation_bits=(32, 8), schedules=("none",)
    )
    result = modiff.search(
        pipe, "relative_l2 <= 5", budget="10m", output=str(tmp_path), space=space, images=1, confirm_images=2,
        reference_sampler="ddim", reference_steps=20, say=lambda line: None,
    )  # fmt: skip
    assert len(result["points"]) == 4
    assert result["best"]["cost"]["gbops"] == min(p["cost"]["gbops"] for p in result["points"])
    assert pipe.scheduler is scheduler
    assert [name for name, _ in pipe.unet.named_modules()] == names
    assert (tmp_path / "frontier.html").is_file()
    with pytest.raises(ConfigError, match="no single denoiser named unet or transformer"):
        modiff.search(object())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--quality", "ssim >= 1"], "names 'ssim', which does not exist"),
        (["--quality", "fid <= 3"], "the teacher has no feature network of its own. Give --features"),
        (["--space.samplers", "[euler_ancestral]"], "'euler_ancestral', which adds noise in every step"),
        (["--cost", "money"], "cost is 'money'"),
        (["--budget", "soon"], "budget is 'soon'"),
        (["--space.steps", "[]"], "space.steps is"),
        (["--images", "9", "--confirm_images", "3"], "confirm_images is 3"),
    ],
)
def test_the_command_refuses_before_it_draws(tmp_path, tiny_teacher, options, match):
    from modiff.lit.commands.search import search

    with pytest.raises(ConfigError, match=match):
        search(["--teacher.path", str(tiny_teacher), "--output", str(tmp_path / "out"), *options])


def test_the_command_writes_a_recipe_that_evaluate_takes(tmp_path, tiny_teacher, capsys):
    from modiff.lit.cli.student import StudentCLI
    from modiff.lit.commands.search import search

    args = ["--teacher.path", str(tiny_teacher), "--output", str(tmp_path / "out"), "--quality", "relative_l2 <= 9"]
    args += ["--space.samplers", "[ddim]", "--space.steps", "[2,3]", "--space.activation_bits", "[8]"]
    args += ["--space.schedules", "[none,reuse-2]", "--images", "2", "--confirm_images", "2", "--batch_size", "2"]
    args += ["--reference_sampler", "ddim", "--reference_steps", "8", "--budget", "5m", "--wandb", "disabled"]
    assert search(args) == 0
    said = capsys.readouterr().out
    assert "The cheapest of 4 settings that keeps relative_l2 <= 9 is" in said
    cli = StudentCLI(
        "evaluate", ["--config", str(tmp_path / "out" / "best.yaml"), "--model.teacher.path", str(tiny_teacher)]
    )
    assert cli.model.scheduler_options == {"clip_sample": False, "thresholding": False}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ConfigError, match="holds files that are not a search"):
        search([*args, "--output", str(tmp_path / "other")])
