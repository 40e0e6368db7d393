"""The study: cheap trials first, promising settings again with more images; resumable, shared by processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState
from torch import Tensor

from modiff.errors import ConfigError
from modiff.lit.search.distances import Distances
from modiff.lit.search.goals import COSTS, CostName, Quality
from modiff.lit.search.space import SearchSpace, Setting
from modiff.lit.search.target import Target
from modiff.metrics.pairwise import mean_psnr_db, relative_l2

log = logging.getLogger("modiff")

EXPLORE, CONFIRM = "explore", "confirm"
IDENTICAL_DB = 120.0
"""PSNR that stands for identical images, where it would be infinite."""
MARGIN_DB = 3.0
"""A reference must be closer to its own refinement than the quality that is asked for, by this much."""


@dataclass(frozen=True)
class Point:
    """A measured setting.

    Args:
        setting: What was measured.
        quality: ``psnr_db`` and ``relative_l2`` to the reference, and the distances where they are asked for.
        cost: ``time``, ``gbops``, ``memory``; see :data:`modiff.lit.search.goals.COSTS`.
        images: How many were drawn.
        seconds: Per image, on this machine.
        evaluations: Denoiser calls per trajectory.
    """

    setting: Setting
    quality: dict[str, float]
    cost: dict[str, float]
    images: int
    seconds: float
    evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Point:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "setting": Setting(**values["setting"])})


@dataclass
class Search:
    """One search for cheap settings that keep a quality.

    Args:
        target: Draws and measures.
        space: What may be chosen.
        quality: The bound to keep.
        cost: What is minimized.
        folder: Holds the journal that processes share.
        images: Drawn for each new setting.
        confirm_images: Drawn again for promising ones.
        reference_sampler: Deterministic sampler of the reference images.
        reference_steps: So many that more change little; this is checked.
        seed: Of Optuna's choices.
        distances: Judges images by Fréchet distances; None: the quality is none.
        say: Called with one line of progress at a time.
    """

    target: Target
    space: SearchSpace
    quality: Quality
    cost: CostName
    folder: Path
    images: int = 8
    confirm_images: int = 32
    reference_sampler: str = "dpmpp_2m"
    reference_steps: int = 200
    seed: int = 0
    distances: Distances | None = None
    say: Callable[[str], None] = print
    _reference: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _points: dict[tuple[str, Setting], Point] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.confirm_images < self.images:
            raise ConfigError(
                f"confirm_images is {self.confirm_images}, but every new setting already draws {self.images} (images). "
                "Confirm with at least as many."
            )
        self.space.check(self.quality)
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def run(self, budget: float) -> list[Point]:
        """Search for ``budget`` seconds; what earlier or other processes measured in the same folder counts.

        Returns:
            Every point measured with ``confirm_images`` so far, and of all other settings their exploring point.

        Raises:
            ConfigError: The budget is too short for one trial, the folder holds a study of another teacher or space,
                or the reference is not converged.
        """
        start = time.monotonic()
        explore, confirm = self._studies()
        self._check_reference()
        for study in (explore, confirm):
            self._take_over(study)
        self._enqueue_corners(explore)
        trials = 0
        while time.monotonic() - start < budget:
            if time.monotonic() - start > budget / 2 or self._waiting(confirm):
                self._promote(explore, confirm)
            study = confirm if self._waiting(confirm) else explore
            if study is explore and self._exhausted(explore):
                self._promote(explore, confirm)
                if not self._waiting(confirm):
                    break
                continue
            self._one_trial(study, start, budget)
            trials += 1
        self._promote(explore, confirm)
        while self._waiting(confirm) and time.monotonic() - start < 1.15 * budget:
            self._one_trial(confirm, start, budget)
            trials += 1
        points = self.points()
        if not points:
            raise ConfigError(
                f"The budget of {budget:g} s was too short for one trial: the reference images took "
                f"{time.monotonic() - start:.0f} s. Give a longer --budget, or fewer images or reference_steps."
            )
        return points

    def points(self) -> list[Point]:
        """All settings measured so far in this folder, each with the most images."""
        found: dict[Setting, Point] = {}
        for study in self._studies():
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                point = Point.from_dict(json.loads(trial.user_attrs["point"]))
                if point.images >= (found[point.setting].images if point.setting in found else 0):
                    found[point.setting] = point
        return sorted(found.values(), key=lambda point: point.cost[self.cost])

    def _studies(self) -> tuple[optuna.Study, optuna.Study]:
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = str(self.folder / "study.journal")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            backend = JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal))
            storage = JournalStorage(backend)
            directions = ["maximize" if self.quality.maximized else "minimize", "minimize"]
            made = [
                optuna.create_study(
                    storage=storage,
                    study_name=name,
                    load_if_exists=True,
                    directions=directions,
                    sampler=optuna.samplers.TPESampler(seed=None, multivariate=True, constant_liar=True)
                    if name == EXPLORE
                    else optuna.samplers.RandomSampler(seed=self.seed),
                )
                for name in (EXPLORE, CONFIRM)
            ]
        self._check_identity(made[0])
        return made[0], made[1]

    def _identity(self) -> dict[str, Any]:
        return {
            "teacher": self.target.fingerprint,
            "noise": json.loads(json.dumps(self.target.noise)),
            "space": json.loads(json.dumps(dataclasses.asdict(self.space))),
            "quality": self.quality.name,
            "cost": self.cost,
            "images": [self.images, self.confirm_images],
            "reference": [self.reference_sampler, self.reference_steps],
        }

    def _check_identity(self, study: optuna.Study) -> None:
        mine, theirs = self._identity(), study.user_attrs.get("identity")
        if theirs is None:
            study.set_user_attr("identity", mine)
            return
        differing = [key for key, value in mine.items() if theirs.get(key) != value]
        if differing:
            key = differing[0]
            what = "for another teacher" if key == "teacher" else f"with another {key} ({theirs.get(key)})"
            raise ConfigError(
                f"The study in {self.folder} was made {what}. Give another --output, or --overwrite true to start anew."
            )

    def reference(self, count: int) -> Tensor:
        """The first ``count`` reference images."""
        if count not in self._reference:
            self._reference[count] = self.target.converged(self.reference_sampler, self.reference_steps, count)
        return self._reference[count][:count]

    def _check_reference(self) -> None:
        """Compare the reference with that of half as many steps."""
        half = self.target.converged(self.reference_sampler, max(self.reference_steps // 2, 1), self.images)
        found = self._qualities(half[: self.images], self.reference(self.images))
        self.say(
            f"Reference: {self.reference_sampler}, {self.reference_steps} steps; half as many are at "
            f"{found['psnr_db']:.1f} dB (relative L2 {found['relative_l2']:.4f})."
        )
        margin = MARGIN_DB if self.quality.name == "psnr_db" else 0.0
        if self.quality.missing(found[self.quality.name]) > -margin:
            raise ConfigError(
                f"The reference ({self.reference_sampler}, {self.reference_steps} steps) is not converged: "
                f"{self.quality.name} to half as many steps is {found[self.quality.name]:.4g}, and {self.quality} is "
                "asked for. Give more reference_steps, another reference_sampler, or a lower quality."
            )

    def _qualities(self, images: Tensor, reference: Tensor) -> dict[str, float]:
        unit = [((x + 1) / 2).clamp(0, 1) for x in (images, reference)]
        psnr = mean_psnr_db(*unit)
        return {
            "psnr_db": IDENTICAL_DB if psnr is None else psnr,
            "relative_l2": float(relative_l2(images, reference).mean()),
            **({} if self.distances is None else self.distances(*unit)),
        }

    def _enqueue_corners(self, study: optuna.Study) -> None:
        for setting in self.space.corners():
            study.enqueue_trial(self.space.params(setting), skip_if_exists=True)

    @staticmethod
    def _take_over(study: optuna.Study) -> None:
        """Queue again what processes of this machine were measuring when they died."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            host, pid = trial.user_attrs.get("owner", ("", 0))
            if host == socket.gethostname() and not psutil.pid_exists(pid):
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params)

    def _exhausted(self, study: optuna.Study) -> bool:
        """Whether every setting of the space was measured."""
        size = 1
        for choices in dataclasses.astuple(self.space):
            size *= len(choices)
        seen = {json.dumps(t.params, sort_keys=True) for t in study.get_trials(deepcopy=False)}
        return len(seen) >= size

    @staticmethod
    def _waiting(study: optuna.Study) -> bool:
        return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _one_trial(self, study: optuna.Study, start: float, budget: float) -> None:
        trial = study.ask()
        trial.set_user_attr("owner", [socket.gethostname(), os.getpid()])
        setting = self.space.suggest(trial).canonical()
        name = study.study_name
        try:
            point = self._measure(study, setting, self.images if name == EXPLORE else self.confirm_images)
        except ConfigError as error:
            log.info("%s: %s", setting, error)
            trial.set_user_attr("refused", str(error))
            study.tell(trial, state=TrialState.FAIL)
            return
        except BaseException:  # interrupted: another process, or the next start, takes the setting
            study.tell(trial, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
            raise
        trial.set_user_attr("point", json.dumps(point.to_dict()))
        study.tell(trial, [point.quality[self.quality.name], point.cost[self.cost]])
        kept = "keeps" if self.quality.missing(point.quality[self.quality.name]) <= 0 else "misses"
        found = f"{self.quality.name} {point.quality[self.quality.name]:.4g} ({kept} it)"
        self.say(
            f"[{time.monotonic() - start:5.0f} of {budget:.0f} s] {setting}: {point.images} images, {found}, "
            f"{point.cost[self.cost]:.4g} {COSTS[self.cost][1]}"
        )

    def _measure(self, study: optuna.Study, setting: Setting, count: int) -> Point:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            known = Point.from_dict(json.loads(trial.user_attrs["point"]))
            if known.setting == setting:
                return known
        found = self.target.measure(setting, count)
        return Point(
            setting=setting,
            quality=self._qualities(found.images[:count], self.reference(count)),
            cost={"time": found.time, "gbops": found.gbops, "memory": found.memory},
            images=count,
            seconds=found.seconds,
            evaluations=found.evaluations,
        )

    def _promote(self, explore: optuna.Study, confirm: optuna.Study) -> None:
        """Ask for more images of the settings on the frontier, and of the cheapest that (nearly) keep the quality."""
        points = [
            Point.from_dict(json.loads(t.user_attrs["point"]))
            for t in explore.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]
        name = self.quality.name
        slack = 0.5 if name == "psnr_db" else 0.1 * abs(self.quality.bound)
        near = sorted(
            (p for p in points if self.quality.missing(p.quality[name]) <= slack), key=lambda p: p.cost[self.cost]
        )
        chosen = [*pareto(points, self.quality, self.cost), *near[:5]]
        for setting in dict.fromkeys(point.setting for point in chosen):
            confirm.enqueue_trial(self.space.params(setting), skip_if_exists=True)


def pareto(points: list[Point], quality: Quality, cost: CostName) -> list[Point]:
    """Points than which no other is both at least as good and cheaper, from cheap to costly."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost[cost], quality.missing(p.quality[quality.name]))):
        if not best or quality.missing(point.quality[quality.name]) < quality.missing(best[-1].quality[quality.name]):
            best.append(point)
    return best


def cheapest(points: list[Point], quality: Quality, cost: CostName) -> Point | None:
    """The cheapest point that keeps the quality."""
    kept = [point for point in points if quality.missing(point.quality[quality.name]) <= 0]
    return min(kept, key=lambda p: p.cost[cost], default=None)


def nearest(points: list[Point], quality: Quality, count: int = 3) -> list[Point]:
    """The points that come closest to a quality that nothing reaches."""
    return sorted(points, key=lambda p: quality.missing(p.quality[quality.name]))[:count]
