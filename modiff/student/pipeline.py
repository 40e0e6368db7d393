"""A diffusers pipeline whose denoisers are students: every call of the pipe is one trajectory of each.

Nothing here imports diffusers: a pipeline is an object with ``components``, that is called.

How the call is wrapped. Python looks up ``__call__`` on the class, so the pipe gets a subclass of its own class, of the
same name: ``isinstance`` holds, and diffusers, which reads class names, sees none. The alternative, to start a
trajectory at ``scheduler.set_timesteps``, knows no end: an interrupted call would leave its state behind.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from modiff.config.quant import QuantConfig
from modiff.errors import ConfigError
from modiff.student.refusals import WHY, reason
from modiff.student.steps import marking_steps
from modiff.student.swap import RECORD, operators, quantize, restore
from modiff.trajectory.contexts import Trajectory, context_names
from modiff.trajectory.session import ATTRIBUTE, hold

DENOISER = re.compile("(unet|transformer)(_.*)?")
CONTEXTS = "_modiff_contexts"
TRAJECTORIES = "trajectories"


def quantize_pipeline(
    pipe: Any,
    config: QuantConfig | str | None = None,
    *,
    contexts: Sequence[str] | None = None,
    denoisers: Sequence[str] | None = None,
    keep_teacher: bool = True,
) -> Any:
    """Quantize a pipeline's denoisers, in place; every ``pipe(...)`` is then one trajectory of each.

    The state is cleared at the end of a call however it ends; batches may differ from call to call. After a call,
    ``pipe.trajectories`` holds the counts of evaluations, by denoiser.

    Guidance in one batch of 2B rows works, also where it switches off mid-way. Guidance in two calls per step keeps a
    state for each: by the names that the pipeline gives its calls (diffusers' ``cache_context``), else by
    ``contexts``; without either, the second call of a step is refused.

    ``pipe.to``, ``enable_model_cpu_offload`` and fused LoRA work; what would act on the original operators is refused:
    unfused LoRA, sequential and group offloading, diffusers' caches, ``save_pretrained``. Denoisers compiled by
    ``torch.compile`` are refused: it would trace the state; compile the student by :func:`modiff.compile`.

    Args:
        pipe: A diffusers ``DiffusionPipeline``, or any object with ``components`` that is called.
        config: What to quantize and how, or a preset's name; None: the denoisers are students already
            (:func:`modiff.load`), and only the call is wrapped.
        contexts: Names of the denoiser calls of one step in their order, such as ``("uncond", "cond")``; one name
            lets all calls share one state.
        denoisers: Names of components; None: ``unet``, ``transformer``, and those whose names start so.
        keep_teacher: As for :func:`modiff.quantize`.

    Returns:
        The same pipeline.

    Raises:
        ConfigError: It has no denoiser, a denoiser cannot be quantized, or is used in a way that cannot work (the
            message says which). The pipeline is then unchanged.
    """
    names = context_names(contexts)
    found = _denoisers(pipe, denoisers)
    if isinstance(config, str):
        config = QuantConfig.preset(config)
    for name, denoiser in found.items():
        _check(name, denoiser)
        if config is None and not hasattr(denoiser, ATTRIBUTE):
            raise ConfigError(
                f"config is None, but {name!r} is no student. Give a config or a preset's name, such as 'w8a8-modiff'."
            )
    if config is not None:
        _quantize_all({id(denoiser): denoiser for denoiser in found.values()}.values(), config, keep_teacher)
    setattr(pipe, CONTEXTS, names)
    setattr(pipe, TRAJECTORIES, {})
    pipe.__class__ = _wrapped(_unwrapped(type(pipe)))
    return pipe


def _quantize_all(denoisers: Iterable[nn.Module], config: QuantConfig, keep_teacher: bool) -> None:
    """Quantize all or none."""
    done: list[nn.Module] = []
    try:
        for denoiser in denoisers:
            done.append(quantize(denoiser, config))
    except Exception:
        for denoiser in done:
            restore(denoiser)
        raise
    for denoiser in done if not keep_teacher else ():
        for operator in operators(denoiser).values():
            operator.drop_original()
        getattr(denoiser, RECORD).keep_teacher = False


def restore_pipeline(pipe: Any, teacher: Any = None) -> Any:
    """Undo :func:`quantize_pipeline`: full-precision denoisers, and the pipeline's own class.

    Args:
        pipe: The pipeline.
        teacher: Where the weights come from where the students were loaded, or made with ``keep_teacher=False``: a
            pipeline with the same components, or the denoiser itself where there is one.

    Returns:
        The same pipeline.

    Raises:
        ConfigError: It is not quantized, the original weights were not kept and no teacher is given, or the teacher
            lacks a denoiser.
        TrajectoryError: A call is under way.
    """
    base = _unwrapped(type(pipe))
    if base is type(pipe):
        raise ConfigError(f"The {base.__name__} is not quantized. Call modiff.quantize_pipeline(pipe, config) first.")
    students = {id(m): (name, m) for name, m in _modules(pipe).items() if hasattr(m, ATTRIBUTE)}
    teachers = {name: _teacher_of(teacher, name, len(students)) for name, _ in students.values()}
    for name, student in students.values():
        restore(student, teachers[name])
    pipe.__class__ = base
    for name in (CONTEXTS, TRAJECTORIES):
        vars(pipe).pop(name, None)
    return pipe


def _teacher_of(teacher: Any, name: str, students: int) -> nn.Module | None:
    """The teacher of one of a pipeline's students."""
    if teacher is None or (isinstance(teacher, nn.Module) and students == 1):
        return teacher
    found = None if isinstance(teacher, nn.Module) else _modules(teacher).get(name)
    if found is None:
        raise ConfigError(
            f"The teacher given has no module {name!r}. Give a pipeline with the components of the quantized one."
        )
    return found


def _modules(pipe: Any) -> dict[str, nn.Module]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict) or not callable(pipe):
        raise ConfigError(
            f"{type(pipe).__name__} is no pipeline (an object with components, that is called). For a denoiser of your "
            "own use modiff.quantize(model, config), and modiff.trajectory(model) around the sampling loop."
        )
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _denoisers(pipe: Any, names: Sequence[str] | None) -> dict[str, nn.Module]:
    modules = _modules(pipe)
    if names is None:
        chosen = [name for name in modules if DENOISER.fullmatch(name)]
    else:
        chosen = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in modules]
    if unknown or not chosen:
        what = f"has no module {unknown[0]!r}" if unknown else "has no denoiser: no module named unet or transformer"
        raise ConfigError(
            f"{type(pipe).__name__} {what}. Its modules are: {', '.join(modules) or 'none'}. Name those that are "
            "called in every step: quantize_pipeline(pipe, config, denoisers=('prior',))."
        )
    return {name: modules[name] for name in dict.fromkeys(chosen)}


def _check(name: str, denoiser: nn.Module) -> None:
    """Refuse a denoiser on which something else acts that would bypass its quantized operators."""
    for inner, module in denoiser.named_modules():
        where, own = f"{name}.{inner}" if inner else name, vars(module)
        if "_orig_mod" in module._modules or own.get("_compiled_call_impl") is not None:
            raise ConfigError(
                f"{where!r} is compiled; torch.compile would trace the state that modiff keeps between evaluations. "
                f"Use the module as it was before torch.compile, and modiff.compile(pipe.{name}) after "
                "quantize_pipeline; other parts of the pipeline may be compiled."
            )
        if "base_layer" in module._modules and not getattr(module, "merged", True):
            adapters = (
                [] if getattr(module, "disable_adapters", False) else list(getattr(module, "active_adapters", []))
            )
            if adapters:
                raise ConfigError(
                    f"{where!r} holds LoRA adapters that are not fused: {', '.join(adapters)}. Call pipe.fuse_lora() "
                    "and pipe.unload_lora_weights() before quantize_pipeline."
                )
        if "_hf_hook" in own and (inner or _offloads_weights(own["_hf_hook"])):
            raise ConfigError(
                f"{where!r} is offloaded by accelerate on its own. Load the pipeline without sequential offloading and "
                "device maps; enable_model_cpu_offload works."
            )


def _offloads_weights(hook: Any) -> bool:
    """Whether a hook of accelerate fetches single weights, and does not only move the denoiser as a whole."""
    return any(getattr(one, "offload", False) is True for one in (hook, *getattr(hook, "hooks", ())))


def _unwrapped(cls: type) -> type:
    return getattr(cls, "_modiff_base", cls)


@functools.cache
def _wrapped(base: Any) -> type:
    """The subclass of a pipeline's class whose calls are trajectories."""

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _trajectories(self):
            return base.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # The subclass has no name by which pickle and deepcopy could find it again.
        return _rebuild, (base,), dict(vars(self))

    members = {name: _refusal(name) for name in WHY if hasattr(base, name)}
    members.update(
        __call__=call,
        __reduce_ex__=reduce,
        __module__=base.__module__,
        __qualname__=base.__qualname__,
        __doc__=base.__doc__,
        _modiff_base=base,
    )
    return type(base.__name__, (base,), members)


def _rebuild(base: type) -> Any:
    pipe: Any = object.__new__(base)
    pipe.__class__ = _wrapped(base)
    return pipe


def _refusal(name: str) -> Callable[..., None]:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        if any(hasattr(module, ATTRIBUTE) for module in _modules(self).values()):
            raise ConfigError(f"{name} on a quantized pipeline {reason(name, pipeline=True)}.")
        return getattr(super(_wrapped(_unwrapped(type(self))), self), name)(*_, **__)

    refuse.__name__ = name
    return refuse


@contextmanager
def _trajectories(pipe: Any) -> Iterator[None]:
    """One trajectory of each student of a pipeline, while it is called."""
    students: dict[str, nn.Module] = {}
    for name, module in _modules(pipe).items():
        if hasattr(module, ATTRIBUTE) and not any(module is other for other in students.values()):
            _check(name, module)
            students[name] = module
    contexts = getattr(pipe, CONTEXTS, None)
    schedulers = [part for part in pipe.components.values() if hasattr(part, "set_timesteps") and hasattr(part, "step")]
    runs = {
        name: Trajectory(order=contexts, guidance_may_end=True, one_call_per_step=bool(schedulers), movable=True)
        for name in students
    }
    with ExitStack() as stack:
        for name, student in students.items():
            stack.enter_context(hold(student, runs[name]))
            stack.enter_context(_named_by_pipeline(student, runs[name]))
        for scheduler in schedulers:
            stack.enter_context(marking_steps(scheduler, list(runs.values())))
        try:
            yield
        finally:
            setattr(pipe, TRAJECTORIES, runs)


@contextmanager
def _named_by_pipeline(student: Any, run: Trajectory) -> Iterator[None]:
    """Let diffusers' ``cache_context`` (on models with ``CacheMixin``) choose the trajectory's context too."""
    original = getattr(student, "cache_context", None)
    if original is None:
        yield
        return

    @functools.wraps(original)
    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with original(name, *args, **kwargs), run.context(name):
            yield

    student.cache_context = cache_context
    try:
        yield
    finally:
        del student.cache_context
