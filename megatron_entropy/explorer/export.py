"""Write the explorer of runs into one HTML file, which needs no server and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_entropy.errors import DataError
from megatron_entropy.explorer import server
from megatron_entropy.explorer.index import Filter, RunReader
from megatron_entropy.files import atomic_writer

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def export(runs: Sequence[RunReader], target: Path, *, samples: int) -> tuple[Path, int]:
    """Write metrics and rollouts as they are now.

    Args:
        target: an .html file, or a folder for `index.html`.
        samples: largest number of responses of each stage, from its first and its last dump of either kind.
    Returns:
        The file, and the number of responses in it.
    """
    file = target if target.suffix == ".html" else target / "index.html"
    if file.is_dir():
        raise DataError(f"--export {target}: is a folder; give it a name that does not end in .html")
    answers: dict[str, Any] = {"runs": server.describe_runs(runs)}
    count = 0
    for number, run in enumerate(runs):
        answers[f"metrics/{number}"] = _metrics(run)
        dumps = answers[f"dumps/{number}"] = _chosen(run.dumps())
        for dump in dumps:
            place = dump["kind"], dump["stage"], dump["step"]
            name = "/".join(map(str, (number, *place)))
            rows = answers[f"rows/{name}"] = list(_rows(run, place, max(1, samples // 4)))
            for row in rows:
                answers[f"sample/{name}/{row['line']}"] = server.describe_sample(run, *place, row["line"])
            count += len(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(file) as temporary:
        temporary.write_text(_page(answers), encoding="utf-8")
    return file, count


def _metrics(run: RunReader) -> dict[str, Any]:
    answer = run.metrics(0, 0)
    whole = {**answer, "more": False, "age": None}
    while answer["more"]:
        answer = run.metrics(answer["offset"], answer["file"])
        whole["rows"] += answer["rows"]
        whole["damaged"] += answer["damaged"]
    return whole


def _chosen(dumps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first and the last dump of every stage and kind."""
    by_place: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for dump in dumps:
        by_place.setdefault((dump["stage"], dump["kind"]), []).append(dump)
    return [dump for group in by_place.values() for dump in ([group[0], group[-1]] if len(group) > 1 else group)]


def _rows(run: RunReader, place: tuple[Any, str, int], count: int) -> Iterator[dict[str, Any]]:
    start: int | None = 0
    while start is not None and count > 0:
        answer = server.describe_rows(run, *place, Filter(), start, count)
        count -= len(answer["rows"])
        start = answer["next"]
        yield from answer["rows"]


def _page(answers: dict[str, Any]) -> str:
    """The page with its style, scripts and answers inside."""
    page = (server.STATIC / "index.html").read_text(encoding="utf-8")
    head, _, rest = page.partition("<!-- files -->")
    body = rest.partition("<!-- end of files -->")[2]
    scripts = "\n".join((server.STATIC / name).read_text(encoding="utf-8") for name in server.SCRIPTS)
    style = (server.STATIC / "style.css").read_text(encoding="utf-8")
    data = json.dumps(answers, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'{head}<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>\n{style}</style>\n'
        f'<script type="application/json" id="answers">{data}</script>\n'
        f"<script>addEventListener('DOMContentLoaded', () => {{\n{scripts}\n}});</script>{body}"
    )
