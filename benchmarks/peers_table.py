"""The tables of peers.md from peers.json."""

from __future__ import annotations

from typing import Any

MODELS = {
    "cifar": "UNet of DDPM for CIFAR-10, 35.7M parameters, random weights",
    "dit": "DiT-S/2, 32x32 latents, random weights",
    "mnist": "packaged MNIST teacher, 2.0M parameters",
}
BASES = ("compiled fp32", "compiled bf16, cast")


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    facts = results.get("provenance", {})
    lines = [
        "# One evaluation on the CPU, beside what a user would pick instead",
        "",
        "    pip install 'modiff[peers]'",
        "    python benchmarks/peers.py prepare",
        "    python benchmarks/peers.py time --threads 1     # and --threads 2, --batch 1, --batch 64 --models mnist",
        "    python benchmarks/peers.py quality",
        "",
        "All arms of a table ran in turns in one process; medians, with quartiles in `peers.json`. One thread: "
        "processor time; two threads: wall time. Peak memory is the growth of the process' resident memory during the "
        "first two evaluations, weights not counted. Speeds are relative to the arm named.",
        "",
        f"Machine: {facts.get('device')}, {facts.get('cores')} cores, {', '.join(facts.get('has', []))}; torch "
        f"{facts.get('torch')}, OpenVINO {facts.get('openvino')}, NNCF {facts.get('nncf')}, onnxruntime "
        f"{facts.get('onnxruntime')}, diffusers {facts.get('diffusers')}.",
    ]
    for key, entry in sorted(results.get("time", {}).items()):
        name, batch, threads = key.split("/")
        lines += ["", f"## {MODELS[name]}: batch {batch}, {threads} thread{'s' * (threads != '1')}", ""]
        lines += ["| arm | ms | x compiled fp32 | x compiled bf16 | peak MiB |", "|---|---:|---:|---:|---:|"]
        medians = {arm: found["seconds"]["median"] for arm, found in entry["arms"].items()}
        for arm, found in entry["arms"].items():
            speeds = [f"{medians[base] / medians[arm]:.2f}" if base in medians else "" for base in BASES]
            peak = found.get("peak_mib")
            memory = "" if peak is None else f"{peak:.0f}"
            lines.append(f"| {arm} | {1e3 * medians[arm]:.1f} | {' | '.join(speeds)} | {memory} |")
        lines += [f"| {arm} | not run: {reason} | | | |" for arm, reason in entry["missing"].items()]
    for key, entry in results.get("quality", {}).items():
        lines += ["", f"## Quality: {MODELS[key.split('/')[0]]}, DDIM, 50 steps, seeds {entry['seeds']}", ""]
        lines += ["PSNR to the float32 images from the same noise.", "", "| arm | PSNR, dB |", "|---|---:|"]
        lines += [f"| {arm} | {found['psnr_db']:.1f} |" for arm, found in entry["arms"].items()]
        lines += [f"| {arm} | not run: {reason} |" for arm, reason in entry["missing"].items()]
    return "\n".join(lines) + "\n"
