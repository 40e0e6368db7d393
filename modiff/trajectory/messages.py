"""Texts of refusals inside a trajectory: what happened, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

SKIPPED = (
    "A package that skips modules, and reuses what they gave in an earlier step, does not combine with modulation: "
    "switch it off, or use modiff's own reuse of blocks, QuantConfig.schedule (docs/frontier.md). If the denoiser "
    "itself calls the operator now and then, exclude it with Rule(..., skip=True)."
)
ALREADY_OPEN = (
    "A trajectory is already open on this student; they can be neither nested nor concurrent. "
    "Close it first. Threads take turns, with a lock around the call, or have a deepcopy each."
)
TRACED = (
    "The student keeps a state between evaluations, which a trace (torch.jit.trace, torch.onnx.export) would hold as "
    "constants. Trace the teacher, or a student with modulation=None."
)


def outside_of_any(name: str) -> str:
    """A modulated operator was called, and no trajectory is open."""
    return (
        f"Modulated operator {name!r} was called outside a trajectory: it would run without the state of the "
        "last evaluation. Wrap the sampling loop in `with modiff.trajectory(student):` and call the student "
        "itself; a pipeline, also of a loaded student, is wrapped by modiff.quantize_pipeline(pipe)."
    )


def outside_of_student(name: str) -> str:
    """An operator was called, and its student was not."""
    return (
        f"Operator {name!r} was called outside its student, so no evaluation was counted. Call the student "
        "itself. Where another method of it, such as forward_with_cfg, calls self.forward: quantize a wrapper, "
        "a module that holds the denoiser and whose forward calls that method."
    )


def other_shape(name: str, now: Sequence[int], first: Sequence[int], evaluation: str) -> str:
    """The batch, or the size of images, changed."""
    return (
        f"The input of operator {name!r} has shape {list(now)} in evaluation {evaluation}, but "
        f"had {list(first)} in the first one. Keep the batch through a trajectory; open a new "
        "one for another batch. Where guidance in one batch switches off, so that its last half remains: "
        "modiff.trajectory(student, guidance_may_end=True)."
    )
