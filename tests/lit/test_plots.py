import numpy as np
import pytest
import torch
from PIL import Image

from modiff.errors import ConfigError
from modiff.lit.report.image_grids import image_grid, labelled_rows
from modiff.lit.report.plots import compare_plot, cost_plot, trajectory_errors_plot
from modiff.lit.report.result import Result


def make_errors(operators=6, steps=5, scale=0.01):
    table = [[None] + [scale * (i + 1) * (j + 1) for j in range(steps - 1)] for i in range(operators)]
    return {
        "timesteps": list(range(20 * steps, 0, -20)),
        "operators": [f"down_blocks.{i // 4}.resnets.{i % 4}.conv" for i in range(operators)],
        "operator_error": table,
        "sample_error": [scale * i / 10 for i in range(steps)],
    }


def make_rows(*psnr, distance=2.0):
    return [
        (
            f"recipe_{i}",
            Result.from_json(
                {
                    "teacher": {"fid": 1.5},
                    "student": {"psnr_db": p, "fid_to_teacher": distance, "fid": None, "relative_l2": 0.1},
                    "features": {"network": "net $x$", "num_features": 32},
                    "num_images": 64,
                    "seed": 0,
                }
            ),
        )
        for i, p in enumerate(psnr)
    ]


def make_cost(count, gbops=1.0):
    row = {"weight_bits": 8, "activation_bits": 4, "state_mib": 0.1, "weight_mib": 0.2, "macs": 1.0}
    return [{"name": f"op{i}", "gbops": gbops / (i + 1), **row} for i in range(count)]


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).copy()


def test_errors_plot_shows_the_data(tmp_path):
    for name, scale in (("a", 0.01), ("b", 0.01)):
        trajectory_errors_plot(make_errors(scale=scale), tmp_path / name, "t")
    assert np.array_equal(pixels(tmp_path / "a"), pixels(tmp_path / "b"))
    changed = make_errors()
    changed["operator_error"][2][3] = 0.9
    trajectory_errors_plot(changed, tmp_path / "c", "t")
    curve = make_errors()
    curve["sample_error"][2] = 0.5
    trajectory_errors_plot(curve, tmp_path / "d", "t")
    for name in "cd":
        assert not np.array_equal(pixels(tmp_path / "a"), pixels(tmp_path / name))


def test_errors_plot_grows_with_operators_and_stays_bounded(tmp_path):
    heights = []
    for count in (10, 60, 300):
        trajectory_errors_plot(make_errors(count, 3), tmp_path / "p.png", "t")
        heights.append(pixels(tmp_path / "p.png").shape[0])
    assert heights[0] < heights[1] < heights[2] < 3000


@pytest.mark.parametrize("value", [None, 0.0, float("nan"), float("inf")])
def test_errors_plot_survives_tables_without_one_positive_number(tmp_path, value):
    errors = make_errors(3, 2)
    errors["operator_error"] = [[value] * 2] * 3
    errors["sample_error"] = [0.0, 0.0]
    trajectory_errors_plot(errors, tmp_path / "p.png", "t")
    assert pixels(tmp_path / "p.png").std() > 0


def test_one_evaluation_and_equal_errors_can_be_drawn(tmp_path):
    errors = {"timesteps": [5], "operators": ["$a_b"], "operator_error": [[0.1]], "sample_error": [0.1]}
    trajectory_errors_plot(errors, tmp_path / "p.png", "<$title^>")
    assert pixels(tmp_path / "p.png").std() > 0


def test_failed_plot_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space"):
        cost_plot(make_cost(3), tmp_path / "p.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("p.png", b"old")]


def test_compare_plot_shows_each_value_and_writes_missing_ones_out(tmp_path):
    drawn = []
    for i, rows in enumerate(
        (make_rows(20.0, 30.0), make_rows(20.0, 31.0), make_rows(20.0, None), make_rows(20.0, 30.0, distance=None))
    ):
        compare_plot(rows, tmp_path / f"{i}.png")
        drawn.append(pixels(tmp_path / f"{i}.png"))
    for i in range(4):
        assert not any(np.array_equal(drawn[i], other) for other in drawn[:i])
    with pytest.raises(ConfigError, match="no recipes; give at least one"):
        compare_plot([], tmp_path / "p.png")


def test_compare_plot_takes_distances_over_decades_and_zero(tmp_path):
    rows = make_rows(20.0, 30.0, -1.0)
    for (_, result), distance in zip(rows, (0.0, 0.01, 400.0), strict=True):
        result.findings.values["student.fid_to_teacher"] = distance
        result.findings.values["student.fid"] = distance + 1
    compare_plot(rows, tmp_path / "p.png")
    assert pixels(tmp_path / "p.png").std() > 0


def test_cost_plot_sums_what_it_does_not_name(tmp_path):
    drawn = []
    for rows in (make_cost(5), make_cost(30), make_cost(30)[:-1], make_cost(5, gbops=0.0)):
        cost_plot(rows, tmp_path / "p.png")
        drawn.append(pixels(tmp_path / "p.png"))
    assert drawn[0].shape[0] < drawn[1].shape[0]
    assert drawn[1].shape == drawn[2].shape
    assert not np.array_equal(drawn[1], drawn[2])  # the sum of the others has changed
    assert not np.array_equal(drawn[0], drawn[3])


def test_cost_plot_draws_weights_and_state(tmp_path):
    drawn = []
    for key in (None, "weight_mib", "state_mib"):
        rows = make_cost(5)
        if key is not None:
            rows[2][key] *= 3
        cost_plot(rows, tmp_path / "p.png")
        drawn.append(pixels(tmp_path / "p.png"))
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_labelled_rows_put_each_grid_right_of_its_label():
    first, second = torch.rand(3, 1, 8, 8), torch.rand(5, 1, 8, 8)
    picture = labelled_rows([("teacher", first), ("w8a4", second)], columns=3)
    above, below = image_grid(first, 3), image_grid(second, 3)
    assert picture.mode == "L"
    assert picture.height == above.height + below.height
    left = picture.width - above.width
    array = np.asarray(picture)
    assert np.array_equal(array[: above.height, left:], np.asarray(above))
    assert np.array_equal(array[above.height :, left:], np.asarray(below))
    for rows in (array[: above.height, :left], array[above.height :, :left]):
        assert rows.min() < 80  # ink of the label
        assert (rows[:, -10:] == 255).all()  # and clear of the images


def test_labelled_rows_break_long_names_and_mix_grey_with_colour():
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0] = 1.0
    name = "w8a4_modiff_without_any_error_compensation_at_all"
    picture = labelled_rows([("a", torch.zeros(1, 1, 8, 8)), (name, image)])
    assert picture.mode == "RGB"
    assert picture.width < 300
    grid = image_grid(image, 1)
    assert picture.height > 2 * grid.height  # the label takes more lines than the image is high
    assert (255, 0, 0) in {color for _, color in picture.getcolors(1 << 16)}


def test_labelled_rows_without_images_are_refused():
    with pytest.raises(ConfigError, match="there are no rows"):
        labelled_rows([])
    with pytest.raises(ConfigError, match="row 'x' has no images"):
        labelled_rows([("x", torch.zeros(0, 1, 4, 4))])
