"""Figures of pairs of images from the same noise: PSNR, relative L2, SSIM, LPIPS; and how well images fit prompts."""

from __future__ import annotations

import torch

from modiff.errors import CheckpointError, ConfigError, ModiffError
from modiff.metrics.clip import CLIP, ClipScore
from modiff.metrics.pairwise import SSIM_WINDOW, PerceptualDistance, psnr_db, relative_l2, ssim
from modiff.metrics.registry import Figure, Findings, ImagePairs, Measure, Setting, Source, measure
from modiff.metrics.sums import MeanOverImages

IDENTICAL = "the student's images are identical to the teacher's, so their PSNR is infinite"
IDENTICAL_CLAMPED = "the student's images, clamped to [0, 1], are identical to the teacher's, so their PSNR is infinite"


@measure
class PixelErrors(Measure):
    """PSNR over the images that differ, and the relative L2 difference in the model's own range."""

    figures = (
        Figure(
            "psnr_db",
            "PSNR to the teacher's images",
            "dB",
            "higher",
            column="PSNR\ndB",
            order=10,
            reason="an image identical to the teacher's has an infinite PSNR",
        ),
        Figure(
            "relative_l2",
            "Relative L2 difference to the teacher's images",
            better="lower",
            column="rel.\nL2",
            order=40,
            digits=3,
        ),
    )

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.psnr, self.l2 = MeanOverImages(), MeanOverImages()

    def update(self, images: ImagePairs) -> None:
        """Take the errors of each pair; identical pairs, whose PSNR is infinite, are left out of the mean."""
        different = (images.teacher != images.student).flatten(1).any(dim=1)
        some = bool(different.any())
        self.psnr.update(psnr_db(images.student[different], images.teacher[different]) if some else torch.empty(0))
        self.l2.update(relative_l2(images.student_raw, images.teacher_raw) if len(images) else torch.empty(0))

    def compute(self) -> Findings:
        """Both means; PSNR is None where every pair is identical."""
        found, l2 = self.psnr.compute(), self.l2.compute()
        reasons = {} if found is not None else {"student.psnr_db": IDENTICAL if l2 == 0 else IDENTICAL_CLAMPED}
        return Findings({"student.psnr_db": found, "student.relative_l2": l2}, reasons)


@measure
class StructuralSimilarity(Measure):
    """SSIM of each pair, where images are as large as its window."""

    figures = (Figure("ssim", "SSIM to the teacher's images", better="higher", order=50),)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.fits = min(setting.image_shape[1:]) >= SSIM_WINDOW
        self.mean = MeanOverImages()

    def update(self, images: ImagePairs) -> None:
        """Take the similarities of each pair."""
        fits = self.fits and len(images) > 0
        self.mean.update(ssim(images.student, images.teacher) if fits else torch.empty(0))

    def compute(self) -> Findings:
        """The mean; absent for smaller images."""
        if not self.fits:
            return Findings(reasons={"student.ssim": f"it needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels"})
        return Findings({"student.ssim": self.mean.compute()})


@measure
class PerceptualSimilarity(Measure):
    """LPIPS of each pair, where its networks are on this machine and take images of this size."""

    figures = (Figure("lpips", "LPIPS to the teacher's images", better="lower", order=51, network="lpips"),)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.network: PerceptualDistance | None = None
        self.obstacle = ""
        self.mean = MeanOverImages()
        try:
            self.network = _tried(setting.image_shape)
        except ModiffError as error:
            self.obstacle = str(error)

    def update(self, images: ImagePairs) -> None:
        """Take the distance of each pair."""
        usable = self.network is not None and len(images) > 0
        self.mean.update(self.network(images.student, images.teacher) if usable else torch.empty(0))  # type: ignore[misc]

    def compute(self) -> Findings:
        """The mean; absent without the network."""
        if self.network is None:
            return Findings(reasons={"student.lpips": self.obstacle})
        return Findings({"student.lpips": self.mean.compute()}, features={"lpips": self.network.name})


@measure
class PromptSimilarity(Measure):
    """CLIP scores of both sides' images and their prompts.

    Raises:
        ConfigError: A CLIP model is asked for, but the teacher takes no prompts or transformers is not installed.
        CheckpointError: A CLIP model is asked for, but is not on this machine.
    """

    figures = (
        Figure(
            "clip_score",
            "CLIP score, 0 to 100",
            better="higher",
            of=("teacher", "student"),
            order=52,
            network="clip",
        ),
    )

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.clip is not None and not setting.prompted:
            raise ConfigError(f"model.clip is {setting.clip!r}, but this teacher draws without prompts. Remove it.")
        self.network: ClipScore | None = None
        self.obstacle = "this teacher draws without prompts"
        if setting.clip is not None:
            self.network = ClipScore(setting.clip)
        elif setting.prompted:
            try:
                self.network = ClipScore(CLIP)
            except ModiffError as error:
                self.obstacle = str(error)
        self.teacher, self.student = MeanOverImages(), MeanOverImages()

    def _means(self) -> dict[Source, MeanOverImages]:
        return {"teacher": self.teacher, "student": self.student}

    def update(self, images: ImagePairs) -> None:
        """Score the images of both sides; samples without prompts do not count."""
        usable = self.network is not None and images.conditions is not None and len(images) > 0
        texts = [str(text) for text in images.conditions or ()]
        for who, mean in self._means().items():
            scores = self.network(getattr(images, who), texts) if usable else torch.empty(0)  # type: ignore[misc]
            mean.update(scores)

    def compute(self) -> Findings:
        """Both means; absent without a CLIP model or prompts."""
        found = {f"{who}.clip_score": mean.compute() for who, mean in self._means().items()}
        if self.network is None or None in found.values():
            reason = self.obstacle if self.network is None else "data gives no prompts"
            return Findings(reasons=dict.fromkeys(found, reason))
        return Findings(found, features={"clip": self.network.name})


def _tried(image_shape: tuple[int, int, int]) -> PerceptualDistance:
    """LPIPS, tried on black images: its networks need more than a few pixels."""
    distance = PerceptualDistance()
    try:
        distance(torch.zeros(1, *image_shape), torch.zeros(1, *image_shape))
    except RuntimeError as error:
        channels, height, width = image_shape
        raise CheckpointError(
            f"{distance.name} takes no images of {height}x{width} pixels and {channels} channels"
        ) from error
    return distance
