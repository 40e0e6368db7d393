"""The table of teachers, and what a recipe says about one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from modiff.errors import CheckpointError, ConfigError

ASSETS = Path(str(files("modiff"))) / "teachers" / "assets"


@dataclass(frozen=True)
class Entry:
    """One row of the zoo.

    Args:
        folder: A diffusers pipeline folder that is there; None: in the hub's local cache.
        hub: Its name on the Hugging Face hub, or None.
        pipeline: diffusers' class of the whole.
        family: How its denoiser is called, a key of :data:`modiff.teachers.families.FAMILIES`; a variant after a dash
            picks the tiny model.
        scheduler: Sampler used by default.
        steps: Its steps.
        guidance: Scale of the guidance used by default; 1: none.
        image_size: Pixels along one side.
        exclude: Operators its recipes leave in full precision, as patterns of rules.
        features: Feature network for a Fréchet distance, or None.
        statistics: Its statistics of the real images, or None.
        gated: The hub asks for a license to be accepted first.
        convert: How its folder is made where the hub has none.
    """

    folder: Path | None = None
    hub: str | None = None
    pipeline: str = "DDPMPipeline"
    family: str = "pixel"
    scheduler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0
    image_size: int | None = None
    exclude: tuple[str, ...] = ()
    features: Path | None = None
    statistics: Path | None = None
    gated: bool = False
    convert: str | None = None


_CONVERT = (
    "convert CompVis' model.ckpt (modiff.teachers.convert.ldm.convert_ldm), save the parts with save_pretrained "
    "as unet/, vqvae/ and scheduler/, and give model.teacher.path that folder"
)
# Embeddings of time, size and text and the last projection: a few operators without a neighbor to hide their error.
_TRANSFORMER_ENDS = ("*embed*", "proj_out")

ZOO: dict[str, Entry] = {
    "mnist": Entry(
        ASSETS / "mnist",
        image_size=32,
        features=ASSETS / "mnist" / "features.safetensors",
        statistics=ASSETS / "mnist" / "feature_statistics.safetensors",
    ),
    "ddpm-cifar10": Entry(hub="google/ddpm-cifar10-32", scheduler="ddim_quadratic", steps=100, image_size=32),
    "ddpm-church": Entry(hub="google/ddpm-church-256", image_size=256),
    "ddpm-bedroom": Entry(hub="google/ddpm-bedroom-256", image_size=256),
    "ddpm-celebahq": Entry(hub="google/ddpm-celebahq-256", image_size=256),
    "ldm-church": Entry(
        pipeline="LDMPipeline", family="latent-kl", steps=200, image_size=256, convert=_CONVERT + " (num_heads=8)"
    ),
    "ldm-bedroom": Entry(
        pipeline="LDMPipeline", family="latent", steps=500, image_size=256, convert=_CONVERT + " (num_head_channels=32)"
    ),
    "ldm-celebahq": Entry(
        hub="CompVis/ldm-celebahq-256", pipeline="LDMPipeline", family="latent", steps=200, image_size=256
    ),
    "sd-v1-4": Entry(
        hub="CompVis/stable-diffusion-v1-4",
        pipeline="StableDiffusionPipeline",
        family="sd",
        scheduler="plms",
        guidance=7.5,
        image_size=512,
    ),
    "sdxl": Entry(
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline="StableDiffusionXLPipeline",
        family="sdxl",
        scheduler="euler",
        guidance=5.0,
        image_size=1024,
    ),
    "sdxl-turbo": Entry(
        hub="stabilityai/sdxl-turbo",
        pipeline="StableDiffusionXLPipeline",
        family="sdxl",
        scheduler="euler_ancestral",
        steps=4,
        image_size=512,
    ),
    "dit-xl-2-256": Entry(
        hub="facebook/DiT-XL-2-256", pipeline="DiTPipeline", family="dit", guidance=1.5, image_size=256
    ),
    "dit-s-2-256": Entry(
        pipeline="DiTPipeline",
        family="dit",
        image_size=256,
        convert="its weights were never published; train it and convert (modiff.teachers.convert.dit.convert_dit), "
        "or measure its architecture with --model.teacher.random true",
    ),
    "pixart-sigma": Entry(
        hub="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        pipeline="PixArtSigmaPipeline",
        family="pixart",
        scheduler="dpmpp_2m",
        steps=20,
        guidance=4.5,
        image_size=1024,
        exclude=("adaln_single.*", "caption_projection.*", "proj_out"),
    ),
    "sd3": Entry(
        hub="stabilityai/stable-diffusion-3-medium-diffusers",
        pipeline="StableDiffusion3Pipeline",
        family="sd3",
        scheduler="flow_euler",
        steps=28,
        guidance=7.0,
        image_size=1024,
        exclude=_TRANSFORMER_ENDS,
        gated=True,
    ),
    "flux-schnell": Entry(
        hub="black-forest-labs/FLUX.1-schnell",
        pipeline="FluxPipeline",
        family="flux",
        scheduler="flow_euler_flux",
        steps=4,
        image_size=1024,
        exclude=_TRANSFORMER_ENDS,
        gated=True,
    ),
    "flux-dev": Entry(
        hub="black-forest-labs/FLUX.1-dev",
        pipeline="FluxPipeline",
        family="flux-guidance",
        scheduler="flow_euler_flux",
        steps=28,
        guidance=3.5,
        image_size=1024,
        exclude=_TRANSFORMER_ENDS,
        gated=True,
    ),
    "sana": Entry(
        hub="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        pipeline="SanaPipeline",
        family="sana",
        scheduler="dpmpp_2m",
        steps=20,
        guidance=4.5,
        image_size=1024,
        exclude=("time_embed.*", "caption_projection.*", "proj_out"),
    ),
}


@dataclass(frozen=True)
class TeacherSpec:
    """Which pretrained denoiser.

    Args:
        name: A name of the zoo; with ``path`` it is only used for the defaults of sampling.
        path: A local diffusers pipeline folder, such as ``modiff train`` exports.
        tiny: A tiny random model of the same class, for trying a recipe; nothing is read.
        random: The architecture at full size with random weights (and a tiny decoder), for figures of time and memory;
            of a folder only the configuration is read.
        image_size: Pixels along one side of the images; None: the model's own.

    Raises:
        ConfigError: The name is unknown, or fields contradict each other.
    """

    name: str = "mnist"
    path: str | None = None
    tiny: bool = False
    image_size: int | None = None
    random: bool = False

    def __post_init__(self) -> None:
        if self.name not in ZOO:
            raise ConfigError(
                f"unknown teacher {self.name!r}; allowed are {', '.join(ZOO)}. For your own give model.teacher.path."
            )
        if self.tiny and self.path is not None:
            raise ConfigError("model.teacher.tiny and model.teacher.path are both given. Remove one of them.")
        if self.tiny and self.random:
            raise ConfigError("model.teacher.tiny and model.teacher.random are both given. Remove one of them.")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"model.teacher.image_size is {self.image_size}; allowed are whole numbers, 1 or more.")

    @property
    def entry(self) -> Entry:
        """Its row of the zoo; a folder of one's own, and a model of random weights, have no feature statistics."""
        entry = ZOO[self.name]
        if self.path is None and not self.tiny and not self.random:
            return entry
        folder = Path(self.path) if self.path is not None else None
        return replace(entry, folder=folder, features=None, statistics=None)

    @property
    def title(self) -> str:
        """Name for tables and pictures."""
        name = self.name if self.path is None else Path(self.path).name
        return f"{name} (tiny, random)" if self.tiny else f"{name} (random weights)" if self.random else name

    def locate(self) -> Path:
        """Find the folder of the files: a local one, else the hub's cache. The network is never asked.

        Raises:
            CheckpointError: It is not on this machine; the message holds the command that downloads it.
        """
        entry = self.entry
        if entry.folder is not None:
            return entry.folder
        if entry.hub is None:
            raise CheckpointError(f"Teacher {self.title!r} has no diffusers folder on the hub: {entry.convert}.")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(entry.hub, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
            raise CheckpointError(
                f"Teacher {self.title!r} is not in the local cache of the hub, and modiff downloads nothing by itself. "
                f"Run: {download_command(entry)}; or give model.teacher.path its folder; or try the recipe with "
                "--model.teacher.tiny true."
            ) from error


def download_command(entry: Entry) -> str:
    """Return the command that brings a teacher into the hub's cache.

    >>> download_command(ZOO["ddpm-cifar10"])
    'hf download google/ddpm-cifar10-32'
    """
    # Whole text-to-image repositories hold each weight several times over, in formats that nothing here reads.
    formats = ("*.fp16.*", "*non_ema*", "*.ckpt", "*.onnx*", "*.msgpack")
    exclude = " --exclude " + " ".join(f'"{pattern}"' for pattern in formats)
    login = "hf auth login && " if entry.gated else ""
    return f"{login}hf download {entry.hub}{'' if entry.pipeline == 'DDPMPipeline' else exclude}"
