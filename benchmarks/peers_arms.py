"""What ``peers.py`` compares: a teacher as ``f(x, t)`` in PyTorch, OpenVINO and onnxruntime, and our students."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from modiff.compiling.modes import compile as compile_student
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

MODELS = {"cifar": "ddpm-cifar10", "dit": "dit-s-2-256", "mnist": "mnist"}
PACKAGED = ("mnist",)
"""Models with trained weights, whose trajectories show quality."""
STEPS = 50
Evaluate = Callable[[Tensor, Tensor], Tensor]


class Denoiser(nn.Module):
    """``forward(x, t)`` of a teacher, a tensor in and out, as exporters want it; labels are fixed."""

    def __init__(self, model: nn.Module, labels: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """One evaluation; ``t`` is ``[B]``."""
        if self.labels is None:
            return self.model(x, t, return_dict=False)[0]
        return self.model(x, timestep=t, class_labels=self.labels, return_dict=False)[0]


class Case:
    """A teacher at one batch size, and inputs that drift as along a trajectory."""

    def __init__(self, name: str, batch: int, work: Path) -> None:
        self.name, self.batch = name, batch
        self.work = work / f"{name}-{batch}"
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        teacher = load_teacher(TeacherSpec(MODELS[name], random=name not in PACKAGED))
        self.sample_shape, self.scheduler_config = teacher.sample_shape, teacher.scheduler_config
        model = teacher.denoiser.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        labels = torch.arange(batch) % 1000 if name == "dit" else None
        self.denoiser = Denoiser(model, labels).eval()
        shape = (batch, *teacher.sample_shape)
        ends = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        self.ends = ends[0], 0.5 * ends[1]

    def at(self, k: int) -> tuple[Tensor, Tensor]:
        """X and t of the k-th of 50 evaluations; later ones drift back, and forth again."""
        k %= 2 * (STEPS - 1)
        share = min(k, 2 * (STEPS - 1) - k) / (STEPS - 1)
        return torch.lerp(*self.ends, share), torch.full((self.batch,), round(999 * (1 - share)))


def opened(arm: Any) -> Any:
    """The trajectory that a student needs; nothing for others."""
    return arm.trajectory() if isinstance(arm, Ours) else nullcontext()


def trajectory_images(case: Case, arm: Any, seed: int, on_evaluation: Any = None) -> Tensor:
    """Images in [0, 1] of one batch: DDIM, 50 steps, from the noise of a seed."""
    noise = indexed_noise(seed, list(range(case.batch)), case.sample_shape, 0)
    noise = noise.contiguous(memory_format=torch.channels_last)
    with opened(arm):
        images = sample(
            lambda x, t: arm(x, torch.as_tensor(t).expand(case.batch).contiguous()),
            make_scheduler("ddim", case.scheduler_config),
            noise,
            STEPS,
            on_evaluation=on_evaluation,
        )
    return (images / 2 + 0.5).clamp(0, 1)


def calibration_inputs(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Inputs of every second evaluation of the teacher's own trajectory; of random weights, of the drift.

    A trajectory is one batch of noise that no measurement uses, so batches are as noisy as in use, at all time steps.
    """
    if case.name not in PACKAGED:
        return [case.at(k) for k in range(0, STEPS, max(2, case.batch))]
    found: list[tuple[Tensor, Tensor]] = []

    def keep(i: int, t: Any, x: Tensor) -> None:
        if i % 2 == 0:
            found.append((x.clone(), torch.full((case.batch,), int(t))))

    trajectory_images(case, case.denoiser, seed=1000, on_evaluation=keep)
    return found


def eager(case: Case) -> Evaluate:
    """PyTorch as it is."""
    return case.denoiser


def compiled(case: Case) -> Evaluate:
    """torch.compile in float32."""
    return torch.compile(copy.deepcopy(case.denoiser), dynamic=False)


def compiled_cast(case: Case) -> Evaluate:
    """torch.compile of the model cast to bfloat16."""
    model = torch.compile(copy.deepcopy(case.denoiser).to(torch.bfloat16), dynamic=False)
    return lambda x, t: model(x.bfloat16(), t).float()


def compiled_autocast(case: Case) -> Evaluate:
    """torch.compile under autocast to bfloat16."""
    model = torch.compile(copy.deepcopy(case.denoiser), dynamic=False)

    def run(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, t).float()

    return run


def openvino(case: Case, precision: str, path: Path) -> Evaluate:
    """OpenVINO at its latency settings, as many threads as PyTorch has."""
    import openvino as ov

    core = ov.Core()
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()

    def run(x: Tensor, t: Tensor) -> Tensor:
        found = request.infer([x.contiguous().numpy(), t.numpy()], share_inputs=True)
        return torch.from_numpy(found[0].copy())

    return run


def ir_file(case: Case) -> Path:
    """The teacher in OpenVINO's format."""
    import openvino as ov

    path = case.work / "float.xml"
    if not path.exists():
        plain = copy.deepcopy(case.denoiser).to(memory_format=torch.contiguous_format)
        ov.save_model(ov.convert_model(plain, example_input=case.at(0)), path, compress_to_fp16=False)
    return path


SUMS = ("Add", "GroupNormalization", "Concat", "Interpolate", "Unsqueeze")
EMBEDDINGS = (".*time_.*", ".*norm1.emb.*", ".*norm1.linear.*")
ENDS = (".*conv_in.*", ".*conv_out.*", ".*pos_embed.*", ".*proj_out.*")


def int8_file(case: Case, tuned: bool) -> Path:
    """The teacher quantized by NNCF.

    Args:
        case: The teacher.
        tuned: Not with default settings but with the best of those that were tried: asymmetric activations (preset
            ``MIXED``), and nothing quantized but the inputs of convolutions and matrix products, of which the first and
            the last one and those of the embeddings stay in float.
    """
    import nncf
    import openvino as ov

    path = case.work / ("int8_tuned.xml" if tuned else "int8.xml")
    if not path.exists():
        inputs = [[x.contiguous().numpy(), t.numpy()] for x, t in calibration_inputs(case)]
        scope = nncf.IgnoredScope(types=list(SUMS), patterns=[*EMBEDDINGS, *ENDS], validate=False)
        options = {"preset": nncf.QuantizationPreset.MIXED, "ignored_scope": scope} if tuned else {}
        model = ov.Core().read_model(ir_file(case))
        quantized = nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs), **options)
        ov.save_model(quantized, path, compress_to_fp16=False)
    return path


def onnxruntime(case: Case) -> Evaluate:
    """Onnxruntime in float32."""
    import onnxruntime as ort

    path = case.work / "float.onnx"
    if not path.exists():
        plain = copy.deepcopy(case.denoiser).to(memory_format=torch.contiguous_format)
        torch.onnx.export(plain, case.at(0), path, dynamo=True, input_names=["x", "t"], external_data=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(x: Tensor, t: Tensor) -> Tensor:
        values = [x.contiguous().numpy(), t.numpy()]
        return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

    return run


def pt2e(case: Case) -> Evaluate:
    """PyTorch's own int8 for the CPU (exported, quantized by torchao with its x86 settings, compiled).

    Time steps are floats, since its observers do not take integers.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    x, t = case.at(0)
    example, path = (x, t.float()), case.work / "pt2e.pt2"
    if not path.exists():
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(case.denoiser, example).module(), quantizer)
        for x, t in calibration_inputs(case):
            prepared(x, t.float())
        torch.export.save(torch.export.export(convert_pt2e(prepared), example), path)
    # Frozen, as PyTorch's tutorial asks for: weights are packed as constants of the graph.
    model = torch.compile(torch.export.load(path).module(), dynamic=False, options={"freezing": True})
    return lambda x, t: model(x, t.float())


class Ours:
    """A student, compiled by modiff.compile.

    Args:
        case: The teacher.
        preset: Of :func:`modiff.quantize`.
        **options: Of :func:`modiff.compile`.
    """

    def __init__(self, case: Case, preset: str, **options: Any) -> None:
        self.model = copy.deepcopy(case.denoiser)
        # The choice needs the teacher's weights; others keep none, as the other arms do.
        self.student = modiff.quantize(self.model.model, preset, keep_teacher="choose" in options)
        compile_student(self.student, **options)

    def trajectory(self) -> Any:
        """Around the evaluations of a batch."""
        return modiff.trajectory(self.student)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """One evaluation."""
        return self.model(x, t)

    def integer_share(self, case: Case) -> float:
        """Share of the operators' multiply-accumulates that run in integers."""
        x, t = case.at(0)
        labels = {} if self.model.labels is None else {"class_labels": self.model.labels}
        return modiff.cost(self.student, x, t, **labels).integer_share


MODULATED, PLAIN = "w8a8-modiff", "w8a8-ptq"
CAST = "compiled bf16, cast"
DEFAULT_INT8 = "OpenVINO int8 (NNCF, default settings)"
TUNED_INT8 = "OpenVINO int8 (NNCF, tuned)"
ARMS: dict[str, Callable[[Case], Any]] = {
    "eager fp32": eager,
    "compiled fp32": compiled,
    CAST: compiled_cast,
    "compiled bf16, autocast": compiled_autocast,
    "OpenVINO fp32": lambda case: openvino(case, "f32", ir_file(case)),
    "OpenVINO bf16": lambda case: openvino(case, "bf16", ir_file(case)),
    DEFAULT_INT8: lambda case: openvino(case, "f32", int8_file(case, tuned=False)),
    TUNED_INT8: lambda case: openvino(case, "f32", int8_file(case, tuned=True)),
    f"{TUNED_INT8}, rest in bf16": lambda case: openvino(case, "bf16", int8_file(case, tuned=True)),
    "onnxruntime fp32": onnxruntime,
    "PyTorch PT2E int8 (torchao)": pt2e,
    "modiff W8A8 plain PTQ": lambda case: Ours(case, PLAIN),
    "modiff W8A8 modulated": lambda case: Ours(case, MODULATED),
    "modiff W8A8 modulated, rest in bf16": lambda case: Ours(case, MODULATED, compute_dtype="bfloat16"),
    "modiff W8A8 modulated, measured choice": lambda case: Ours(case, MODULATED, choose="measured"),
}


def build(case: Case, name: str) -> Any:
    """An arm that has made its first evaluations."""
    arm = ARMS[name](case)
    with opened(arm):
        for k in range(2):
            arm(*case.at(k))
    return arm


def reason(error: Exception) -> str:
    """What another library says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else repr(error)
