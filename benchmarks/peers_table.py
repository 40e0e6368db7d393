"""The tables of peers.md from peers.json."""

from __future__ import annotations

from typing import Any

MODELS = {
    "cifar": "UNet of DDPM for CIFAR-10, 35.7M parameters, random weights",
    "dit": "DiT-S/2, 32x32 latents, random weights",
    "mnist": "packaged MNIST teacher, 2.0M parameters",
}
BASES = ("compiled fp32", "compiled bf16, cast")
HEAD = """# One evaluation on the CPU, beside what a user would pick instead

    pip install 'modiff[peers]'
    python benchmarks/peers.py prepare --threads 1      # once, and --threads 2: exports, calibrations, compiler caches
    python benchmarks/peers.py --threads 1              # processor time of one thread; --threads 2: wall time
    python benchmarks/peers.py quality
    python benchmarks/peers.py memory --threads 2

All arms of a table of times ran in turns in one process; they are medians over the rounds, with quartiles in
`peers.json`. Speeds are relative to the arm named. *In integers* is the share of the operators' multiply-accumulates.
Memory is the peak resident memory of three evaluations in a process of the arm's own, weights and the libraries that it
loads included, less that of a process that has only imported PyTorch and modiff. "Tuned" NNCF is the best of the
settings that were tried (see below): asymmetric activations, and only the inputs of convolutions and matrix products in
int8, embeddings and the first and last operator in float."""


def markdown(results: dict[str, Any], notes: str = "") -> str:
    """All tables, and notes below them."""
    lines = [HEAD, "", *_machines(results)]
    if "build" in results:
        first, second = results["build"]["first_s"], results["build"]["second_s"]
        lines += ["", f"The C++ operators are built in {first:.0f} s, and loaded by later processes in {second:.2f} s."]
    for key, entry in sorted(results.get("time", {}).items()):
        lines += _times(key, entry, results)
    for key, entry in results.get("quality", {}).items():
        lines += _quality(key, entry, results)
    return "\n".join(lines) + "\n" + (f"\n{notes}" if notes else "")


def _machines(results: dict[str, Any]) -> list[str]:
    """Where the figures come from; one line for each set of versions."""
    found: dict[str, None] = {}
    for step in ("time", "quality", "memory"):
        for entry in results.get(step, {}).values():
            facts = entry.get("provenance") or results.get("provenance", {})
            names = {"torch": "torch", "openvino": "OpenVINO", "nncf": "NNCF", "onnxruntime": "onnxruntime"}
            names |= {"torchao": "torchao", "diffusers": "diffusers"}
            versions = ", ".join(f"{label} {facts[name]}" for name, label in names.items() if name in facts)
            has = ", ".join(facts.get("has", []))
            found[f"Machine: {facts.get('device')}, {facts.get('cores')} cores, {has}; {versions}."] = None
    return [*found]


def _times(key: str, entry: dict[str, Any], results: dict[str, Any]) -> list[str]:
    name, batch, threads = key.split("/")
    memory = _memory(key, results)
    rounds = entry.get("settings", entry).get("rounds")
    clock = "1 thread, processor time" if threads == "1" else f"{threads} threads, wall time"
    lines = ["", f"## {MODELS[name]}: batch {batch}, {clock}, {rounds} rounds", ""]
    lines += ["| arm | ms | x compiled fp32 | x compiled bf16 | in integers | memory, MiB |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    medians = {arm: found["seconds"]["median"] for arm, found in entry["arms"].items()}
    for arm, found in entry["arms"].items():
        speeds = [_speed(medians, arm, base) for base in BASES]
        share, peak = found.get("integer_share"), memory.get(arm)
        cells = [arm, f"{1e3 * medians[arm]:.1f}", *speeds, "" if share is None else f"{share:.0%}"]
        lines.append(f"| {' | '.join([*cells, '' if peak is None else f'{peak:.0f}'])} |")
    return lines + [f"| {arm} | not run: {text} | | | | |" for arm, text in entry["missing"].items()]


def _speed(medians: dict[str, float], arm: str, base: str) -> str:
    return f"{medians[base] / medians[arm]:.2f}" if base in medians and arm in medians else ""


def _memory(key: str, results: dict[str, Any]) -> dict[str, float]:
    """Peaks of a group, at whatever number of threads they were measured."""
    group = key.rpartition("/")[0]
    found: dict[str, float] = {}
    for name, entry in results.get("memory", {}).items():
        if name.rpartition("/")[0] == group:
            found |= {arm: value["peak_mib"] for arm, value in entry["arms"].items()}
    return found


def _quality(key: str, entry: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """PSNR and times in one table."""
    model, batch = key.split("/")
    times = {k: e["arms"] for k, e in sorted(results.get("time", {}).items()) if k.startswith(f"{model}/")}
    seeds = entry.get("settings", entry).get("seeds")
    lines = ["", f"## Quality and time: {MODELS[model]}, DDIM, 50 steps, batches of {batch}, seeds {seeds}", ""]
    lines += [
        "PSNR of whole trajectories to the float32 images from the same noise; errors of single evaluations on the "
        "teacher's own inputs (`||a - b|| / ||b||`, first, middle and last one); times of one evaluation, and speed "
        "relative to compiled fp32 in brackets.",
        "",
    ]
    heads = [f"ms, batch {k.split('/')[1]}, {k.split('/')[2]} thread{'s' * (k[-1] != '1')}" for k in times]
    lines += [f"| {' | '.join(['arm', 'PSNR, dB', 'errors', *heads])} |", f"|---|{'---:|' * (2 + len(heads))}"]
    for arm, found in entry["arms"].items():
        cells = []
        for arms in times.values():
            medians = {name: value["seconds"]["median"] for name, value in arms.items()}
            speed = _speed(medians, arm, BASES[0])
            cells.append(f"{1e3 * medians[arm]:.1f}" + (f" ({speed})" if speed else "") if arm in medians else "")
        errors = ", ".join(f"{value:.3f}" for value in found.get("relative_errors", []))
        psnr = "exact" if found["psnr_db"] is None else f"{found['psnr_db']:.1f}"
        lines.append(f"| {' | '.join([arm, psnr, errors, *cells])} |")
    blank = " |" * (1 + len(heads))
    return lines + [f"| {arm} | not run: {text} |{blank}" for arm, text in entry["missing"].items()]
