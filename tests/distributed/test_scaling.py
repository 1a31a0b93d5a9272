"""The scaling benchmark's figures that can be known: bytes of gradients, tokens, efficiency; one kind of row and page.

Times are not looked at. Over two nodes it is shown by tests/cluster/test_scaling_nodes.py; not run on a GPU.
"""

import dataclasses

import benchmark_rows
import benchmark_scaling
import pytest
from benchmark_rows import Row
from benchmark_scaling import forward_flops, layout_of, make_row, peak_tflops, save, with_efficiency
from local_ranks import run_on_ranks
from scaling_rank import RankResult, Settings, Timing, measure

SETTINGS = Settings(
    model="tiny",
    kinds=("weak", "strong"),
    phases=("score", "update", "sync"),
    repeats=1,
    tokens=128,
    total_tokens=192,
    lengths=(20, 40),
    microbatch=96,
    prompts=1,
    response_tokens=1,
    engines=1,
    threads=1,
    dtype="float32",
)


LAYOUTS = ("auto", "pp=2")


def measure_layouts(settings: Settings) -> list[RankResult]:
    return [measure(settings, layout_of(text, 2)) for text in LAYOUTS]


def test_two_ranks(tmp_path):
    by_rank = run_on_ranks(measure_layouts, 2, SETTINGS)
    rows = []
    for text, results in zip(LAYOUTS, zip(*by_rank, strict=True), strict=True):
        rows += [make_row(results, kind, phase, text, SETTINGS) for kind in SETTINGS.kinds for phase in SETTINGS.phases]
        assert [results[0].timings[kind, "update"].tokens for kind in SETTINGS.kinds] == [256, 192]
    data, pipeline = (
        next(
            row.values for row in rows if {("layout", text), ("kind", "weak"), ("phase", "update")} <= row.case.items()
        )
        for text in LAYOUTS
    )
    parameters = by_rank[0][0].arch.num_parameters
    assert 0 <= data["all-reduce bytes"] - 4 * parameters < 1000  # fp32 gradients, and a few numbers
    assert data["all-reduce alone_s"] > 0 and "bubble_s" not in data
    hidden, tokens = 64, 256
    assert pipeline["send bytes"] >= 4 * hidden * tokens and "bubble_s" in pipeline  # activations, padding included
    assert all(values["exposed_s"] is not None for values in (data, pipeline))
    save(tmp_path, rows, benchmark_rows.conditions("note of the test"))
    again = [dataclasses.replace(row, values=row.values | {"seconds": 123.0}) for row in rows[:1]]
    save(tmp_path, again, benchmark_rows.conditions())
    kept = benchmark_rows.read(tmp_path / "scaling.json")
    assert len(kept["rows"]) == len(rows) and len(kept["runs"]) == 2
    page = (tmp_path / "README.md").read_text()
    assert "123" in page and "note of the test" in page and "Not run on a GPU" in page
    assert (tmp_path / "weak.png").stat().st_size and (tmp_path / "strong.png").stat().st_size
    assert "## scaling: scaling" in benchmark_rows.page(tmp_path)


def row(ranks: int, speed: float, oversubscribed: bool = False) -> Row:
    case = {"model": "m", "device": "cpu", "kind": "weak", "phase": "update", "layout": "auto", "ranks": ranks}
    return Row(case, {"tokens_per_s_per_rank": speed, "oversubscribed": oversubscribed})  # type: ignore[arg-type]


def test_efficiency_is_relative_to_the_fewest_ranks():
    rows = with_efficiency([row(2, 80.0), row(1, 100.0), row(4, 20.0, True)])
    assert [found.values["efficiency"] for found in rows] == [0.8, 1.0, None]


def test_layouts_fill_up_with_data_parallel_ranks():
    assert layout_of("auto", 8).dp == 8
    assert layout_of("tp=2,pp=2,sequence_parallel=true", 8).dp == 2
    for text in ("tp=3", "dp=3", "tq=2", "tp"):
        with pytest.raises(ValueError):
            layout_of(text, 8)


def test_flops_and_peaks(tmp_path):
    result = RankResult({("weak", "score"): Timing([2.0], [1.0], [1.0], tokens=128)}, _arch(), "n", "NVIDIA H100 80GB")
    found = make_row([result], "weak", "score", "auto", dataclasses.replace(SETTINGS, dtype="bfloat16"))
    flops = forward_flops(_arch(), 30)
    assert flops == 2 * _arch().num_parameters + 4 * 4 * 64 * 30
    assert found.values["tflops_per_rank"] == pytest.approx(64 * flops / 1e12)
    assert found.values["mfu"] == pytest.approx(64 * flops / 989e12)
    assert [peak_tflops(name) for name in ("NVIDIA H200", "NVIDIA H20", "cpu", "RTX 4090")] == [989, 148, None, None]
    assert benchmark_scaling.BACKWARD["update"] == 3


def _arch():
    from scaling_rank import model_folder

    from megatron_entropy.config.architecture import read_architecture

    with model_folder("tiny") as folder:
        return read_architecture(folder)
