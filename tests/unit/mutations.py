"""Damaged files for tests: a file's bytes with a few of them replaced, removed or inserted."""

from __future__ import annotations

from hypothesis import strategies as st

TOKENS = [
    b"",
    b"null",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"\\ud800"',
    b"\xff",
    b"\x00",
    b"[" * 3000,
]


def damaged(content: bytes, *, edits: int = 3) -> st.SearchStrategy[bytes]:
    """Strategy of copies of `content` with 1 to `edits` short pieces replaced, or cut off at some byte."""
    edit = st.tuples(
        st.integers(0, len(content)), st.integers(0, 12), st.one_of(st.sampled_from(TOKENS), st.binary(max_size=3))
    )

    def apply(chosen: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for start, length, new in chosen:
            result = result[:start] + new + result[start + length :]
        return result

    cut = st.integers(0, max(len(content) - 1, 0)).map(lambda end: content[:end])
    return st.one_of(st.lists(edit, min_size=1, max_size=edits).map(apply), cut)
