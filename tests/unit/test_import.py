import subprocess
import sys

HEAVY = (
    "lightning",
    "pytorch_lightning",
    "wandb",
    "diffusers",
    "datasets",
    "matplotlib",
    "jsonargparse",
    "torchmetrics",
)


def test_importing_modiff_pulls_in_nothing_heavy():
    code = f"import sys, modiff; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_public_names_exist():
    import modiff

    assert all(hasattr(modiff, name) for name in modiff.__all__)
    assert {
        "QuantConfig",
        "QuantSpec",
        "Modulation",
        "Rule",
        "quantize",
        "restore",
        "describe",
        "trajectory",
        "cost",
    } <= set(modiff.__all__)
