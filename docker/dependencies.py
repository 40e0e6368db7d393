"""Print the dependencies of a pyproject.toml, one in a line: what pip installs before the source is there."""

import re
import sys
from pathlib import Path


def dependencies(text: str) -> list[str]:
    """The list `dependencies` of the section `[project]`; read by hand, because Python 3.10 reads no TOML."""
    section = text.split("[project]", 1)[1]
    found = re.search(r"^dependencies = \[\n(.*?)^\]", section, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit("there is no list of dependencies under [project]")
    return re.findall(r'^\s*"([^"]+)"', found[1], re.MULTILINE)


if __name__ == "__main__":
    print("\n".join(dependencies(Path(sys.argv[1]).read_text())))
