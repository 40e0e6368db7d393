"""Exceptions for single operators: rules on their names, and operators that are quantized in halves."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import Literal, get_args

from modiff.config.checks import boolean, integer, member, shown, side
from modiff.config.specs import Modulation, QuantSpec, check_weight
from modiff.errors import ConfigError

Kind = Literal["any", "linear", "conv"]


@dataclass(frozen=True)
class Rule:
    """An exception for the operators whose qualified name matches ``pattern``; the last matching rule wins.

    Args:
        pattern: A glob on the qualified module name (``down_blocks.*.conv1``), or ``re:`` and a regular expression.
        weight: A spec replaces the whole weight spec, None means full precision, ``"inherit"`` the config's own.
        activation: The same for activations.
        modulation: The same for modulation; None: plain quantization.
        skip: Leave the operator untouched.
        type: Apply to ``linear`` or ``conv`` operators only, or to ``any``.
    """

    pattern: str
    weight: QuantSpec | None | Literal["inherit"] = "inherit"
    activation: QuantSpec | None | Literal["inherit"] = "inherit"
    modulation: Modulation | None | Literal["inherit"] = "inherit"
    skip: bool = False
    type: Kind = "any"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError(
                f"pattern is {shown(self.pattern)}; give a glob on module names, such as 'conv_in' or '*.to_q'."
            )
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise ConfigError(f"pattern {shown(self.pattern)} is not a regular expression: {error}.") from error
        side("weight", self.weight, QuantSpec, allow_inherit=True)
        side("activation", self.activation, QuantSpec, allow_inherit=True)
        side("modulation", self.modulation, Modulation, allow_inherit=True)
        boolean("skip", self.skip)
        member("type", self.type, get_args(Kind))
        if isinstance(self.weight, QuantSpec):
            check_weight(self.weight)

    def matches(self, name: str, kind: str) -> bool:
        """Whether the rule applies to operator ``name`` of ``kind`` (``linear`` or ``conv``)."""
        return self.type in ("any", kind) and self.names(name)

    def names(self, name: str) -> bool:
        """Whether the pattern matches, whatever the operator's type.

        >>> Rule("mid_block.*").names("mid_block.conv1"), Rule("re:conv_(in|out)").names("conv_in")
        (True, True)
        """
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Special:
    """What operators of a special kind get in place of the config's own specs; a rule that matches one still wins.

    Args:
        weight: A spec replaces the whole weight spec, None means full precision, ``"inherit"`` the config's own.
        activation: Likewise for activations.
        names: The operators; None: found when the student is made, from the structure of diffusers' networks or from
            ``quantize(..., example_inputs=)``, else in the first evaluation, which decides for activations only.

    Raises:
        ConfigError: A field is of the wrong kind.
    """

    weight: QuantSpec | None | Literal["inherit"] = "inherit"
    activation: QuantSpec | None | Literal["inherit"] = "inherit"
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        side("weight", self.weight, QuantSpec, allow_inherit=True)
        side("activation", self.activation, QuantSpec, allow_inherit=True)
        if isinstance(self.weight, QuantSpec):
            check_weight(self.weight)
        if self.names is not None:
            if not isinstance(self.names, (list, tuple)) or not all(isinstance(name, str) for name in self.names):
                raise ConfigError(f"names is {self.names!r}; give a list of qualified names of operators, or None.")
            object.__setattr__(self, "names", tuple(self.names))


@dataclass(frozen=True)
class Split:
    """An operator whose input is a concatenation along channels, quantized in two halves (Q-Diffusion).

    Args:
        name: Its qualified module name; the halves are ``<name>.first`` and ``<name>.second``, and rules for ``name``
            apply to both.
        at: Input channels of the first half.

    Raises:
        ConfigError: A field is of the wrong kind.
    """

    name: str
    at: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name is {shown(self.name)}; give the qualified name of an operator.")
        integer("at", self.at, low=1)
