"""Write semantic entropies beside the rows of a data set, and draw their histogram."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_entropy.data.readers import read_raw_rows
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.files import atomic_writer

INT_COLUMNS = ("semantic_clusters", "semantic_samples")


@contextmanager
def user_writer(path: Path) -> Iterator[Path]:
    """`files.atomic_writer` for a file that the user has named.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with atomic_writer(path) as temporary:
            yield temporary
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def all_rows(files: Sequence[Path]) -> Iterator[Mapping[str, object]]:
    """The rows of all files as they are stored, in order."""
    for file in files:
        for _, row in read_raw_rows(file):
            yield row


def write_rows(out: Path, files: Sequence[Path], columns: Sequence[Mapping[str, Any]]) -> None:
    """Write the first rows of the files with additional columns; parquet keeps its column types.

    Args:
        out: a `.parquet` or `.jsonl` file.
        files: the data files.
        columns: the additional columns of each row, all with the same names.
    Raises:
        ConfigError: the file cannot be written.
        DataError: parquet files whose columns have different types.
    """
    if out.suffix == ".parquet":
        _write_parquet(out, files, columns)
        return
    with user_writer(out) as temporary, temporary.open("w") as stream:
        for row, added in zip(all_rows(files), columns, strict=False):
            stream.write(json.dumps({**row, **added}, ensure_ascii=False, default=str) + "\n")


def _write_parquet(out: Path, files: Sequence[Path], columns: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        tables = [
            pyarrow.parquet.read_table(file)
            if file.suffix == ".parquet"
            else pyarrow.Table.from_pylist(list(all_rows([file])))
            for file in files
        ]
        table = pyarrow.concat_tables(tables, promote_options="default").slice(0, len(columns))
    except pyarrow.ArrowException as error:
        raise DataError(f"{out}: the rows do not fit one parquet file: {' '.join(str(error).split())}") from None
    names = dict.fromkeys(itertools.chain.from_iterable(columns))
    types = [(name, pyarrow.int64() if name in INT_COLUMNS else pyarrow.float64()) for name in names]
    added = pyarrow.Table.from_pylist(list(columns), schema=pyarrow.schema(types))
    for name in names:
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, added[name])
    with user_writer(out) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def plot_histogram(path: Path, entropies: Sequence[float], median: float, title: str) -> None:
    """Draw a histogram of entropies in nats, with the median marked, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(entropies, bins=40, color="#1f5f8b")
    axes.axvline(median, color="#c8553d", linewidth=1.2)
    axes.annotate(f" median {median:.3f}", (median, 0.95), xycoords=("data", "axes fraction"), color="#c8553d")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("semantic entropy (nats)")
    axes.set_ylabel("questions")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with user_writer(path) as temporary:
        figure.savefig(temporary, format="png")
