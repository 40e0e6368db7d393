"""The ``modiff`` command: options, parsing, errors in plain words."""
