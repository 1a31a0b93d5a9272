"""What machines of a run must have in common, and the interface they use; whole nodes are tested in tests/cluster.

Also which of several ranks prints a failure, and how an error of Ray's memory monitor reads.
"""

import copy
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropy.distributed import liveness, network
from megatron_entropy.errors import ConfigError
from megatron_entropy.launch import agreement, failures, rank

FACTS = {
    "node": "a", "config": "1", "model": {"/m": "1"}, "data": {"/d": "1"}, "code": "1",
    "versions": {"torch": "2.11", "ray": "2.60"}, "gpus": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "2"}, "the configuration differs between a and b"),
        ({"model": {"/m": "2"}}, "/m holds other files on a and b"),
        ({"data": {"/d": "2"}}, "/d holds other rows on a and b"),
        ({"code": "2"}, "megatron_entropy differs between a and b"),
        ({"versions": {"torch": "2.12"}}, "torch 2.11 and 2.12, ray 2.60 and missing"),
        ({"gpus": 0}, "a has 8 GPUs and b has 0"),
    ],
)
def test_a_difference_names_the_machines(changes, message):
    other = copy.deepcopy(FACTS) | {"node": "b"}
    agreement.compare([FACTS, other, other])
    with pytest.raises(ConfigError, match=message):
        agreement.compare([FACTS, other, other | changes])


def test_fewer_gpus_than_ranks(monkeypatch):
    monkeypatch.setattr(agreement.preflight, "count_gpus", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="4 GPUs for 8 ranks"):
        agreement.describe_machine()


def test_hashes_see_every_change(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    before = agreement._hash_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(9))
    larger = agreement._hash_model(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({before, larger, agreement._hash_model(tmp_path)}) == 3
    rows = tmp_path / "rows"
    rows.write_bytes(b"x" * (3 * agreement.SAMPLE))
    first = agreement._hash_file(rows)
    rows.write_bytes(b"x" * (3 * agreement.SAMPLE - 1) + b"y")
    assert first != agreement._hash_file(rows)


def test_the_interface_of_an_address_is_chosen(monkeypatch):
    for variable in (network.GLOO, network.NCCL):
        monkeypatch.delenv(variable, raising=False)
    assert network.choose_interface("127.0.0.1") == "lo"
    monkeypatch.setenv(network.GLOO, "eth7")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=eth7: .* has no such interface; it has .*lo"):
        network.choose_interface("127.0.0.1")
    monkeypatch.setenv(network.GLOO, "lo")
    with pytest.raises(ConfigError, match="loopback cannot reach"):
        network.choose_interface("10.0.0.1")


def test_a_failure_is_printed_on_its_node_and_by_rank_zero():
    nodes = ["a", "a", "b", "b"]
    peers = [SimpleNamespace(rank=rank, nodes=nodes, node=nodes[rank]) for rank in range(4)]
    assert [not failures.is_quiet(p, 3) for p in peers] == [True, False, False, True]  # type: ignore[arg-type]
    assert [not failures.is_quiet(p, 1) for p in peers] == [False, True, False, False]  # type: ignore[arg-type]


def test_a_broken_connection_is_no_bug():
    error = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:4")
    failure = failures.describe(error, rank=1, node="b")
    assert (failure.kind, failure.details) == ("lost", "")
    assert failure.message == "rank 1 on b: the connection to another rank broke: Connection closed by peer [::1]:4"
    assert failures.describe(RuntimeError("shapes differ"), rank=0).kind == "bug"


def test_a_stop_signal_waits_for_a_connection_that_comes_back():
    """After a short cut the store's connection may still be silent; the step is done and saved first."""
    ended = []
    peers: Any = SimpleNamespace(rank=0, world_size=2, nodes=["a", "b"], node="a")
    watch = liveness.Liveness(peers, lost_after=300, end=lambda reason, code: ended.append((reason, code)))
    begin = watch._heard[1]
    watch._stop_signal, watch._signalled = signal.SIGTERM, begin + 20
    watch._judge(begin + 29)
    watch._heard[1] = begin + 25
    watch._judge(begin + 34)
    assert not ended
    watch._judge(begin + 36)
    assert ended == [("SIGTERM received while rank 1 on b does not answer; continue with --resume", 143)]


def test_every_rank_ends_with_the_code_of_the_first_failure(capsys):
    left: dict[str, Any] = {}
    peers: list[Any] = [
        SimpleNamespace(
            rank=number,
            nodes=["a", "b"],
            node="ab"[number],
            failure=lambda timeout: left.get("failure"),
            post_failure=lambda failure: left.setdefault("failure", failure),
        )
        for number in range(2)
    ]
    reason = "SIGTERM received while rank 1 on b does not answer"
    assert rank._report_loss(peers[0], reason, 143) == 143
    assert rank._report_loss(peers[1], "another rank has failed", 1) == 143
    assert capsys.readouterr().err == f"error: rank 0 on a: {reason}\n"


def test_the_memory_monitor_is_named():
    from megatron_entropy.rollout.ray_cluster import one_line

    text = "Died.\n1 worker(s) were killed due to the node running low on memory. 9 GB used\nRefer to the documentation"
    assert one_line(RuntimeError(text)).startswith("1 worker(s) were killed due to the node running low on memory.")
