"""A schema: rows with the columns `problem`, `result` and, for supervised training, `working`."""

from megatron_entropy.data.schemas import Message, RawRow, Row, Schema


def read(row: RawRow) -> Row:
    """Turn one row of the file into a question, its answer and its worked solution."""
    working = row.get("working")
    return Row(
        messages=(Message("user", str(row["problem"])),),
        answer=str(row["result"]),
        target=None if working is None else str(working),
    )


SCHEMA = Schema(columns=("problem", "result"), read=read)
