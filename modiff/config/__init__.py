"""What is asked for: specs, modulation, rules, presets."""

from modiff.config.quant import QuantConfig
from modiff.config.rules import Rule, Special, Split
from modiff.config.specs import Modulation, QuantSpec

__all__ = ["Modulation", "QuantConfig", "QuantSpec", "Rule", "Special", "Split"]
