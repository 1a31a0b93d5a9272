"""Headers of the safetensors files of a model folder: names, shapes and types, without the weights and without torch.

The safetensors library checks a header when it opens a file: its size, its JSON, offsets that overlap, leave gaps or
end elsewhere than the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.errors import ModelError
from megatron_entropy.files import read_json
from megatron_entropy.weights.names import entries

INDEX = "model.safetensors.index.json"
WEIGHT_TYPES = ("F32", "BF16", "F16")
"""Types that weights may have, by their names in safetensors files."""


class Header(NamedTuple):
    """Where a tensor is stored, and what it is; `kind`: its type by the name in safetensors files."""

    file: Path
    shape: tuple[int, ...]
    kind: str


class TensorHeaders:
    """Headers of a model folder's tensors by name."""

    def __init__(self, folder: str | Path) -> None:
        """Read the headers of the files that the index names, or without an index of all files.

        Raises:
            ModelError: for a folder without safetensors files, a file that is missing or not one, a tensor in two
                files, or an index that does not fit the files.
        """
        self.folder = Path(folder)
        self._headers: dict[str, Header] = {}
        index = _read_index(self.folder)
        for file in _weight_files(self.folder, index):
            with open_weights(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name in self._headers:
                        raise ModelError(f"{file}: tensor {name} is in {self._headers[name].file.name} too")
                    tensor = opened.get_slice(name)
                    self._headers[name] = Header(file, tuple(tensor.get_shape()), tensor.get_dtype())
        for name, file_name in index.items():
            if name not in self._headers or self._headers[name].file.name != file_name:
                raise ModelError(f"{self.folder / file_name}: tensor {name} is missing; {INDEX} names it")

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._headers)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.find(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.find(name).shape

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor can be used.

        Raises:
            ModelError: when it is missing, has another shape than `config.json` implies, or a type that weights may not
                have.
        """
        file, found, kind = self.find(name)
        if found != shape:
            raise ModelError(f"{file}: tensor {name} has shape {found}, config.json implies {shape}")
        if kind not in WEIGHT_TYPES:
            raise ModelError(f"{file}: tensor {name} has type {kind}, not one of {', '.join(WEIGHT_TYPES)}")

    def find(self, name: str) -> Header:
        """Header of a tensor.

        Raises:
            ModelError: when it is missing.
        """
        if name not in self._headers:
            raise ModelError(f"{self.folder}: tensor {name} is missing; config.json implies it")
        return self._headers[name]


def check_model(folder: str | Path, arch: ModelArchitecture) -> None:
    """Check by the headers alone that a Hugging Face folder holds every weight of an architecture.

    Raises:
        ModelError: see `TensorHeaders` and `TensorHeaders.check`.
    """
    headers = TensorHeaders(folder)
    for entry in entries(arch):
        for name, shape in zip(entry.tensors, entry.shapes, strict=True):
            headers.check(name, shape)


def open_weights(file: Path, framework: str) -> Any:
    """Open a safetensors file for tensors of `framework`: `numpy`, or `pt` for torch.

    Raises:
        ModelError: it cannot be read, or is not a safetensors file.
    """
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{file}: corrupt or not a safetensors file: {reason}") from None


def _read_index(folder: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file; empty without an index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    weight_map = read_json(path, ModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: not an index of safetensors files: weight_map must be an object with entries")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise ModelError(f"{path}: not an index of safetensors files: {file!a:.60} is not the name of one")
    return weight_map


def _weight_files(folder: Path, index: dict[str, str]) -> list[Path]:
    files = sorted({folder / file for file in index.values()} if index else folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors file found; a model folder needs its weights in them")
    for file in files:
        if not os.path.isfile(file):
            found = "not a regular file" if os.path.lexists(file) else "no such file"
            raise ModelError(f"{file}: {found}" + (f", but {INDEX} names it" if index else ""))
    return files
