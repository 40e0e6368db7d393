"""Classes or prompts of the samples to draw, assigned in turn by sample index."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modiff.errors import ConfigError
from modiff.lit.data.noise import NoiseDataModule
from modiff.storage.hashing import short_hash

PROMPT_COLUMNS = ("prompt", "caption", "text", "captions", "sentences")
LABEL_COLUMNS = ("label", "labels", "class")


class SampleDataModule(NoiseDataModule):
    """Indices of the samples to draw, with a class or a prompt for each: entry ``i mod N`` of N.

    Args:
        batch_size: Samples per batch and rank.
        num_images: Samples to keep.
        labels: Classes, or a file or data set of them; None: all classes of the teacher in turn, where it has any.
        prompts: File of prompts (text: one in a line; csv, tsv, parquet: a column) or a Hugging Face data set.
        column: Column of a table; None: ``prompt``, ``caption`` or ``text``; ``label`` or ``class`` for labels.
        split: Split of a Hugging Face data set.

    Raises:
        ConfigError: Both are given, a source is missing or empty, or has no such column.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_images: int | None = 128,
        labels: list[int] | str | None = None,
        prompts: str | None = None,
        column: str | None = None,
        split: str = "train",
    ) -> None:
        super().__init__(batch_size, num_images)
        if labels is not None and prompts is not None:
            raise ConfigError("data.labels and data.prompts are both given. Remove one of them.")
        self.entries: Sequence[int] | Sequence[str] | None = None
        if prompts is not None:
            self.entries = [_prompt(value) for value in read_column(prompts, column, split, PROMPT_COLUMNS)]
        elif isinstance(labels, str):
            self.entries = [_label(value) for value in read_column(labels, column, split, LABEL_COLUMNS)]
        elif labels is not None:
            self.entries = [_label(value) for value in labels]
        if self.entries is not None and not self.entries:
            raise ConfigError(f"data.{'prompts' if prompts else 'labels'} is empty. Give at least one.")

    def conditions(self, indices: list[int]) -> list[Any] | None:
        """Classes or prompts of samples ``indices``; None where the recipe gives none."""
        entries = self.entries
        return None if entries is None else [entries[i % len(entries)] for i in indices]

    def identity(self) -> dict[str, Any]:
        """Content of the conditions, for the identity of a run; empty where there are none."""
        return {} if self.entries is None else {"conditions": short_hash(list(self.entries))}


class LabelDataModule(SampleDataModule):
    """Samples of classes; see :class:`SampleDataModule`.

    Args:
        labels: Classes, or a file or data set of them; None: all classes of the teacher in turn.
        batch_size: Samples per batch and rank.
        num_images: Samples to keep.
        column: Column of a table.
        split: Split of a Hugging Face data set.
    """

    def __init__(
        self,
        labels: list[int] | str | None = None,
        batch_size: int = 64,
        num_images: int | None = 128,
        column: str | None = None,
        split: str = "train",
    ) -> None:
        super().__init__(batch_size, num_images, labels=labels, column=column, split=split)


class PromptDataModule(SampleDataModule):
    """Samples of prompts; see :class:`SampleDataModule`.

    Args:
        prompts: File of prompts or a Hugging Face data set.
        batch_size: Samples per batch and rank.
        num_images: Samples to keep.
        column: Column of a table.
        split: Split of a Hugging Face data set.
    """

    def __init__(
        self,
        prompts: str,
        batch_size: int = 64,
        num_images: int | None = 128,
        column: str | None = None,
        split: str = "train",
    ) -> None:
        super().__init__(batch_size, num_images, prompts=prompts, column=column, split=split)


def read_column(source: str, column: str | None, split: str, names: Sequence[str]) -> list[Any]:
    """One column of a text file, a table, or a Hugging Face data set; empty lines of a text file are left out.

    Raises:
        ConfigError: The source or the column is not there, or holds nothing.
    """
    path = Path(source)
    if path.suffix == ".txt":
        values: list[Any] = [line.strip() for line in _text(path).splitlines() if line.strip()]
    elif path.suffix in (".csv", ".tsv"):
        rows = list(csv.DictReader(_text(path).splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
        chosen = _column(source, column, list(rows[0]) if rows else [], names)
        values = [row[chosen] for row in rows]
    elif path.suffix == ".parquet":
        values = _parquet(path, column, names)
    else:
        dataset = _hub(source, split)
        values = list(dataset[_column(source, column, dataset.column_names, names)])
    if not values:
        raise ConfigError(f"{source} is empty. Give a file with at least one entry.")
    return values


def _text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Give a text, CSV or parquet file, or the name of a data set.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def _parquet(path: Path, column: str | None, names: Sequence[str]) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Give a text, CSV or parquet file, or the name of a data set.")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        chosen = _column(str(path), column, file.schema_arrow.names, names)
        return file.read([chosen])[chosen].to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is no parquet file, or damaged: {error}. Copy it again.") from error


def _column(source: str, column: str | None, found: list[str], names: Sequence[str]) -> str:
    if not found:
        raise ConfigError(f"{source} is empty. Give a file with at least one entry.")
    chosen = column or next((name for name in names if name in found), None)
    if chosen not in found:
        wanted = repr(column) if column else f"none of {', '.join(names)}"
        raise ConfigError(f"{source} has the columns {', '.join(found)}, {wanted} asked for. Give one: --data.column.")
    return chosen


def _hub(name: str, split: str) -> Any:
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    offline = None
    try:  # one question with a time limit: datasets itself would try again for minutes
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except Exception as error:  # of many kinds: no network, no such name, offline mode
        offline = error
    config = datasets.DownloadConfig(local_files_only=offline is not None, max_retries=0)
    try:
        return datasets.load_dataset(name, split=split, download_config=config)
    except Exception as error:
        why = type(offline or error).__name__
        raise ConfigError(
            f"{name!r} is no file, and split {split!r} of a data set of that name is neither on the hub within reach "
            f"nor in the local cache ({why}). Give a text, CSV or parquet file, or run: hf download {name} "
            "--repo-type dataset."
        ) from error


def _prompt(value: Any) -> str:
    """A prompt; if an image has several captions, the first one."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(value, dict):
        value = value.get("raw") or value.get("text")
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"prompt {value!r} is no text. Remove it, or give another column: --data.column.")
    return value.strip()


def _label(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"label {value!r} is no whole number. Give classes as 0, 1, ...") from None
