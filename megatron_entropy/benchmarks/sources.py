"""Sources of a benchmark's rows: a file on this machine, or a data set of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from megatron_entropy.data.readers import READERS, RawRow, read_raw_rows
from megatron_entropy.errors import DataError, MissingPackageError

HUB = "hf://"
HUB_SOURCE = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%-]+))?")


def find_source(name: str, hub: str, data_folder: str | Path | None) -> str:
    """Find the rows of a benchmark.

    Args:
        name: of the benchmark.
        hub: `hf://ORG/NAME[/CONFIG][:SPLIT]`; empty for a benchmark that has none.
        data_folder: folder with `NAME.SUFFIX` or `NAME/test.SUFFIX`, for a suffix of `readers.READERS`; or None.
    Returns:
        The file's path, or `hub` where there is no file.
    Raises:
        DataError: no such folder; two files for the benchmark; or neither a file nor a data set.
    """
    if data_folder is not None and not Path(data_folder).is_dir():
        raise DataError(f"--data {data_folder}: no such folder")
    files = [] if data_folder is None else _files(Path(data_folder), name)
    if len(files) > 1:
        raise DataError(f"{name}: both {files[0]} and {files[1]} have this name; keep one of them")
    if not files and not hub:
        raise DataError(f"{name}: no data; set data = FILE for it in the suite file, or {_how_to_place(name)}")
    return str(files[0]) if files else hub


def _files(folder: Path, name: str) -> list[Path]:
    candidates = [folder / f"{stem}{suffix}" for stem in (name, f"{name}/test") for suffix in READERS]
    return [path for path in candidates if path.is_file()]


def _how_to_place(name: str) -> str:
    return f"put it at FOLDER/{name}.jsonl or FOLDER/{name}/test.jsonl (or .json, .csv, .parquet) and add --data FOLDER"


def read_source(source: str, name: str) -> Iterator[tuple[str, RawRow]]:
    """Read the rows of a source in their order, each with its location for messages.

    Args:
        source: a file, or `hf://ORG/NAME[/CONFIG][:SPLIT]`; the split is `test` by default.
        name: of the benchmark.
    Raises:
        DataError: the file cannot be read, or the data set cannot be loaded.
        MissingPackageError: the package `datasets` is needed and not installed.
    """
    return _hub_rows(source, name) if source.startswith(HUB) else read_raw_rows(Path(source))


def _hub_rows(source: str, name: str) -> Iterator[tuple[str, RawRow]]:
    parts = HUB_SOURCE.fullmatch(source)
    if parts is None:
        raise DataError(f"{source}: a data set is written hf://ORG/NAME[/CONFIG][:SPLIT]")
    for number, row in enumerate(_load(parts, source, name)):
        yield f"{source} row {number}", cast(RawRow, row)


def _load(parts: re.Match[str], source: str, name: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            f"{name}: {source} needs the package datasets: pip install 'megatron-entropy[eval]'; or download it and "
            f"{_how_to_place(name)}"
        ) from error
    try:
        return datasets.load_dataset(parts["name"], parts["config"], split=parts["split"] or "test")
    except Exception as error:  # no network, a gated or unknown data set, a broken file
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name}: {source} cannot be loaded ({type(error).__name__}: {reason}); where there is a network, download "
            f"https://huggingface.co/datasets/{parts['name']} and {_how_to_place(name)}"
        ) from error
