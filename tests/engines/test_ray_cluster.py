"""Joining a Ray cluster, and which GPUs and nodes its engines get, on a real Ray with invented GPUs.

Proves: engines never get a GPU that a trainer's rank uses, too few free GPUs are named with their number, engines stay
on the nodes they may use, and a cluster that cannot be joined says why. Not proved here: CUDA.
"""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import ConfigError
from megatron_entropy.rollout import placement, ray_join
from megatron_entropy.rollout.placement import TrainerGpu

HERE = socket.gethostname()


@pytest.fixture(scope="module")
def cluster():
    """A node with six invented GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray.init(num_cpus=6, num_gpus=6, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def start(size: int, names=()):
    """What an engine is to Ray: an actor with GPUs."""

    class Engine:
        def gpus(self) -> list[str]:
            return [str(gpu) for gpu in ray.get_gpu_ids()]

    options = {"num_cpus": 1, "num_gpus": size, "label_selector": placement.selector(names)}
    return ray.remote(Engine).options(**options).remote()  # type: ignore[attr-defined]


def test_engines_get_no_gpu_of_the_trainer(cluster):
    nodes = placement.living_nodes()
    held = placement.hold_gpus(nodes, [TrainerGpu(HERE, "1"), TrainerGpu(HERE, "4"), TrainerGpu("elsewhere", "0")])
    assert len(held) == 2
    placement.check_room(RolloutConfig(num_engines=2, tensor_parallel=2), nodes, on_gpus=True, num_held=2)
    with pytest.raises(ConfigError, match=r"has room for 2 of rollout.num_engines=3 engines, .* 2 GPUs are missing"):
        placement.check_room(RolloutConfig(num_engines=3, tensor_parallel=2), nodes, on_gpus=True, num_held=2)
    engines = [start(2), start(2, [HERE])]
    seen = ray.get([engine.gpus.remote() for engine in engines], timeout=120)
    assert sorted(gpu for gpus in seen for gpu in gpus) == ["0", "2", "3", "5"]
    late = start(1)
    waiting, _ = ray.wait([late.gpus.remote()], timeout=3)
    assert not waiting, "it would be on a GPU of the trainer"


def test_names_of_gpus_and_nodes_must_fit(cluster):
    nodes = placement.living_nodes()
    with pytest.raises(ConfigError, match=rf"rollout.nodes: node-z is no node of the Ray cluster, which has {HERE}"):
        placement.choose(nodes, ["node-z"])
    assert placement.selector([HERE]) == {"ray.io/node-id": nodes[0].ray_id} == placement.selector([nodes[0].address])
    two = [*nodes, placement.Node("b", "node-b", "10.0.0.2", cpus=4, gpus=3)]
    assert [node.name for node in placement.choose(two, ["10.0.0.2"])] == ["node-b"]


def test_one_machine_needs_gpus_beside_the_trainers(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert placement.gpus_beside_the_trainer(RolloutConfig(num_engines=2)) == ["6", "7"]
    with pytest.raises(ConfigError, match=r"need 4 GPUs beside the trainer's 2; this machine has 4, so 2 are missing"):
        placement.gpus_beside_the_trainer(RolloutConfig(num_engines=2, tensor_parallel=2))


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """A head that wants a token, or runs another Ray."""

    def __init__(self, version: str) -> None:
        self.version = version

    def CheckAlive(self, request, context):  # noqa: N802, the service's name
        if not self.version:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("version", "problem"),
    [("", "set RAY_AUTH_MODE=token"), ("1.2.3", "it runs Ray 1.2.3 and .* has"), (ray.__version__, "^$")],
)
def test_the_head_is_asked_why(version, problem):

    server = grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(version), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert re.search(problem, ray_join.find_problem(f"127.0.0.1:{port}"))
    finally:
        server.stop(0)


def test_addresses_where_no_head_is(monkeypatch):
    monkeypatch.setattr(ray_join, "REPLY_TIMEOUT", 1.0)
    assert "cannot reach it (Connection refused)" in ray_join.find_problem("127.0.0.1:1")
    for address in ("ray://node:10001", "node", "auto"):
        assert ray_join.find_problem(address).startswith("write HOST:PORT")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no head of Ray" in ray_join.find_problem(f"127.0.0.1:{silent.getsockname()[1]}")
