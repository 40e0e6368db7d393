"""``modiff statistics``: feature statistics of real images, the reference of every Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser

from modiff.errors import ConfigError
from modiff.lit.cli.base import quiet
from modiff.lit.cli.errors import parse_plainly
from modiff.lit.data.batches import DeviceBatches, ImageDataset
from modiff.lit.data.images import ImageDataModule
from modiff.lit.runs.control import current
from modiff.lit.runs.launchers import settle_single_rank
from modiff.metrics.features import count_features, load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.statistics import FeatureStatistics


def make_parser() -> ArgumentParser:
    """Make the parser of ``modiff statistics``."""
    parser = ArgumentParser(
        prog="modiff statistics",
        exit_on_error=False,
        description="Mean and covariance of a data set's features, for --model.reference and --reference.",
    )
    parser.add_argument(
        "--features", type=str, required=True, help="Feature network: safetensors, TorchScript, inception."
    )
    parser.add_argument("--output", type=str, required=True, help="The .safetensors file to write.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace an existing file.")
    parser.add_argument("--split", type=Literal["train", "test"], default="train", help="Which images.")
    parser.add_argument("--device", type=str, default="auto", help="auto: the GPU where there is one; or cpu, cuda:1.")
    parser.add_class_arguments(ImageDataModule, "data")
    return parser


def statistics(args: Sequence[str]) -> int:
    """Run ``modiff statistics --features NETWORK --data.path FOLDER --output FILE``."""
    quiet()
    settle_single_rank("statistics")
    options = parse_plainly(make_parser(), args)
    data = ImageDataModule(**options.data.as_dict())
    output = Path(options.output)
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output} must end in .safetensors.")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"--output {output} exists: add --overwrite true to replace it, or give another --output.")
    network = load_feature_network(options.features)
    data.setup()
    images = data.train_set if options.split == "train" else data.test_set
    assert images is not None
    found = measure(network, images, pick_device(options.device), data.batch_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    found.save(output)
    current().over = True
    print(f"{found.num_images} images, {found.num_features} features of {found.network}: {output}")
    return 0


def pick_device(name: str) -> torch.device:
    """Find a device by its name.

    Raises:
        ConfigError: There is no such device.
    """
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name!r} cannot be used here ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from error
    return device


def measure(network: torch.nn.Module, images: ImageDataset, device: torch.device, batch_size: int) -> FeatureStatistics:
    """Measure the features of a data set, in its order and without flips."""
    # On the network's first device: a TorchScript network does not say how many features it has.
    num_features = count_features(network, images.images[:2].float() / 255)
    metric = ImageFidelity(network, num_features=num_features, max_kept=4).to(device)  # single features are not needed
    for batch in DeviceBatches(images, batch_size, device, shuffle=False):
        metric.update(batch["image"], "reference")
    return metric.statistics("reference")
