"""Real vLLM engines in Ray actors, with weights synced from a plain source.

Proves: log-probs, and the entropies recorded while sampling, equal those of transformers at several temperatures, also
where the sampler cuts the vocabulary; a completion is a function of the request and the weights alone (not of the
batch, the number of engines, or the death of an engine); a weight sync replaces the weights and survives dead engines,
changed bytes and missing tensors; the death of Ray's head is reported soon, whatever waits for Ray. Not proved here:
sharded sources, GPUs.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import PreTrainedModel

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import ChecksumError, ConfigError, EngineFault, EngineLost, Fault
from megatron_entropy.rollout import ray_cluster
from megatron_entropy.rollout.engine import Completion, EngineSpec, Request
from megatron_entropy.rollout.pool import EnginePool
from megatron_entropy.weights.buckets import Bucket, TensorMeta
from megatron_entropy.weights.sync import WeightSync
from megatron_entropy.weights.transport import Sender

EOS = 1
MAX_LEN = 256
TIMEOUT = 180.0
"""Seconds for anything that should happen at once; a loaded machine may need them."""
SIZES = {  # vLLM's attention on a CPU takes heads of 32 and more
    "vocab_size": 90,  # vLLM pads it to a multiple of 64
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.1,
    "eos_token_id": EOS,
}


class Source:
    """The parameters of a model as a source of weights; `on_slab` is called before each slab is read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        self.rows_read = 0
        self.gather_seconds = 0.0

    def metadata(self) -> list[TensorMeta]:
        self.rows_read = 0
        return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None, *, in_place: bool) -> None:
        assert out is not None
        self.on_slab(number)
        out.copy_(self.tensors[number][1][first : first + count])
        self.rows_read += count

    def on_slab(self, number: int) -> None:
        """Nothing, here."""


def qwen3(seed: int, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=tied)).float().eval()


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the only file an engine reads."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return qwen3(0)


@pytest.fixture(scope="module")
def spec(model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    folder = tmp_path_factory.mktemp("qwen3")
    save_config(model, folder)
    return EngineSpec(str(folder), MAX_LEN, (EOS,), threads=1)


@pytest.fixture(scope="module")
def pool(spec: EngineSpec) -> Iterator[EnginePool]:
    """Two engines that decode at most 32 sequences at a time, so that a generation needs several updates."""
    config = RolloutConfig(num_engines=2, max_num_seqs=32, max_restarts=5, entropy=True, top_alternatives=3)
    pool = EnginePool(config, spec)
    pool.wait_ready()
    yield pool
    pool.shutdown()


@pytest.fixture(scope="module")
def weight_sync(model: Qwen3ForCausalLM) -> WeightSync:
    return WeightSync(Source(model), bucket_bytes=2**15, checksum=True, timeout=TIMEOUT)


def killing_updates(pool: EnginePool, index: int) -> Callable[[list[list[Request]]], Iterator]:
    """`EnginePool._updates` that kills an engine after its first completions."""
    original, pids = pool._updates, [pool.pids[index]]

    def updates(shards: list[list[Request]]) -> Iterator:
        for engine, update in original(shards):
            yield engine, update
            if engine == index and update and pids:
                os.kill(pids.pop(), signal.SIGKILL)

    return updates


def requests(count: int, max_tokens: int = 40, **sampling: float) -> list[Request]:
    generator = np.random.default_rng(5)
    sampling = {"temperature": 0.7} | sampling
    return [
        Request(
            (7, index), tuple(generator.integers(2, 90, 5 + index % 20).tolist()), 100 + index, max_tokens, **sampling
        )
        for index in range(count)
    ]


def answers(pool: EnginePool, wanted: list[Request]) -> list[Completion]:
    done, dead = pool.generate(wanted, "test")
    assert dead == [] and [completion.key for completion in done] == [request.key for request in wanted]
    return done


def assert_same(left: list[Completion], right: list[Completion]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.key == other.key and one.finish_reason == other.finish_reason
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-6)  # a shorter batch adds in another order


def worst_difference(model: PreTrainedModel, wanted: list[Request], done: list[Completion]) -> float:
    """Largest difference of an engine's log-prob or entropy from those of transformers' softmax(logits / temperature).

    The log-probs are those before top-p and top-k, if the engine has recorded them.
    """
    worst = 0.0
    for request, completion in zip(wanted, done, strict=True):
        tokens, begin = torch.tensor([*request.tokens, *completion.tokens.tolist()]), len(request.tokens)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, begin - 1 : -1]
        for position, row in enumerate(logits):
            seen = tokens[: begin + position].unique()
            penalty = row[seen].sign() * math.log(request.repetition_penalty)
            row[seen] *= (-penalty).exp()
        logprobs = torch.log_softmax(logits / request.temperature, -1)
        expected = [logprobs.gather(1, tokens[begin:, None])[:, 0]]
        found = [completion.logprobs]
        if completion.entropy is not None:
            expected.append(torch.special.entr(logprobs.exp()).sum(-1))
            found = [completion.uncut_logprobs, completion.entropy]
        for ours, theirs in zip(expected, found, strict=True):
            worst = max(worst, float((ours - torch.from_numpy(theirs.copy())).abs().max()))
    return worst


def test_generating_without_weights_is_refused(pool: EnginePool) -> None:
    with pytest.raises(AssertionError, match="no weights"):
        pool.generate(requests(1), "test")


def test_logprobs_equal_transformers(pool: EnginePool, weight_sync: WeightSync, model: Qwen3ForCausalLM) -> None:
    stats = weight_sync.sync(1, pool.clients())
    assert stats is not None and stats.num_bytes >= sum(4 * tensor.numel() for tensor in model.parameters())
    wanted = requests(64, max_tokens=100)
    done = answers(pool, wanted)
    assert worst_difference(model, wanted, done) < 1e-4  # fp32 on both sides, sums in another order
    assert {completion.finish_reason for completion in done} == {"stop", "length"}
    for completion in done:
        assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
        assert (completion.finish_reason == "stop") == (completion.tokens[-1] == EOS)
        assert EOS not in completion.tokens[:-1] and len(completion.tokens) <= 100
    request, completion = wanted[0], done[0]
    assert completion.alternatives is not None
    with torch.no_grad():
        logits = model(torch.tensor([[*request.tokens, *completion.tokens.tolist()]])).logits[0]
    expected = torch.log_softmax(logits[len(request.tokens) - 1 : -1] / request.temperature, -1).topk(3)
    np.testing.assert_array_equal(completion.alternatives.tokens, expected.indices)
    np.testing.assert_allclose(completion.alternatives.logprobs, expected.values, atol=1e-4)


def test_the_backend_of_the_weight_sync_follows_the_machine(pool: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.backend(trainer_on_one_machine=True) == "shared_memory"
    assert pool.backend(trainer_on_one_machine=False) == "gloo"
    monkeypatch.setattr(pool, "_config", RolloutConfig(weight_transfer="shared_memory"))
    with pytest.raises(ConfigError, match=r"rollout.weight_transfer='shared_memory' needs all ranks"):
        pool.backend(trainer_on_one_machine=False)
    for setting in ("nccl", "cuda_ipc"):
        monkeypatch.setattr(pool, "_config", RolloutConfig(weight_transfer=setting))
        with pytest.raises(ConfigError, match=rf"rollout.weight_transfer='{setting}' needs engines on GPUs"):
            pool.backend(trainer_on_one_machine=True)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.7, "repetition_penalty": 1.3},
    ],
)
def test_entropies_are_of_the_distribution_before_the_cut(
    pool: EnginePool, weight_sync: WeightSync, model: Qwen3ForCausalLM, sampling: dict
) -> None:
    weight_sync.sync(1, pool.clients())
    wanted = requests(80, **sampling)  # more than twice the 32 slots of an engine
    done = answers(pool, wanted)
    assert worst_difference(model, wanted, done) < 1e-4
    for completion in done:
        assert completion.entropy.dtype == completion.uncut_logprobs.dtype == np.float32
        is_cut = "top_p" in sampling
        assert (completion.logprobs >= completion.uncut_logprobs - 1e-5).all()
        assert (np.abs(completion.logprobs - completion.uncut_logprobs).max() > 0.01) == is_cut


def test_top_p_samples_from_the_nucleus(pool: EnginePool, weight_sync: WeightSync) -> None:
    weight_sync.sync(1, pool.clients())
    full, nucleus = answers(pool, requests(16)), answers(pool, requests(16, top_p=0.3))
    assert min(completion.logprobs.min() for completion in nucleus) > min(c.logprobs.min() for c in full)


def test_top_k_and_the_repetition_penalty_reach_the_sampler(pool: EnginePool, weight_sync: WeightSync) -> None:
    weight_sync.sync(1, pool.clients())
    for completion in answers(pool, requests(8, top_k=1)):
        assert not completion.logprobs.any()  # one token has all of the probability
    wanted = requests(8, max_tokens=16, top_k=1, repetition_penalty=1e6)
    for request, completion in zip(wanted, answers(pool, wanted), strict=True):
        tokens = completion.tokens.tolist()
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(request.tokens)
    plain = answers(pool, requests(8, max_tokens=16, top_k=1))
    assert any(len(set(completion.tokens.tolist())) < len(completion.tokens) for completion in plain)


def test_a_completion_does_not_depend_on_batch_or_engine(pool: EnginePool, weight_sync: WeightSync) -> None:
    weight_sync.sync(1, pool.clients())
    wanted = requests(48)
    done = answers(pool, wanted)
    assert_same(answers(pool, wanted[5:8]), done[5:8])
    assert_same(answers(pool, wanted[::-1])[::-1], done)
    # One at a time, all requests go to the first engine; before, half of them went to the second.
    assert_same([answers(pool, [request])[0] for request in wanted[:8]], done[:8])


def test_a_sync_replaces_the_weights(pool: EnginePool, weight_sync: WeightSync, model: Qwen3ForCausalLM) -> None:
    wanted = requests(8)
    before = answers(pool, wanted)
    other = qwen3(1)
    weight_sync.close()  # engines listen to one sender at a time
    WeightSync(Source(other), timeout=TIMEOUT).sync(2, pool.clients())
    changed = answers(pool, wanted)
    assert worst_difference(other, wanted, changed) < 1e-4
    assert worst_difference(model, wanted, changed) > 0.1
    weight_sync.sync(3, pool.clients())
    assert_same(answers(pool, wanted), before)


def test_an_engine_is_killed_while_it_generates(
    pool: EnginePool, weight_sync: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_sync.sync(1, pool.clients())
    wanted = requests(400, max_tokens=100)
    undisturbed = answers(pool, wanted)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_updates", killing_updates(pool, 1))
        done, dead = pool.generate(wanted, "test")
    assert dead == [1] and 0 < len(done) < len(wanted)
    pool.restart(dead)
    weight_sync.sync(1, pool.clients())
    answered = {completion.key for completion in done}
    done += answers(pool, [request for request in wanted if request.key not in answered])
    assert_same(sorted(done, key=lambda completion: completion.key), undisturbed)


def test_an_engine_is_killed_during_a_sync(pool: EnginePool, weight_sync: WeightSync, model: Qwen3ForCausalLM) -> None:
    weight_sync.sync(1, pool.clients())
    before = answers(pool, requests(8))
    victim = pool.pids[0]

    class Killing(Source):
        def on_slab(self, number: int) -> None:
            if number == 6:
                os.kill(victim, signal.SIGKILL)

    source = Killing(model)
    weight_sync.close()
    with pytest.raises(EngineLost) as caught:
        WeightSync(source, bucket_bytes=2**12, timeout=TIMEOUT).sync(2, pool.clients())
    assert caught.value.indices == (0,)
    # A sync is a collective: the other ranks read to the end.
    assert source.rows_read == sum(len(tensor) for _, tensor in source.tensors)
    pool.restart(caught.value.indices)
    weight_sync.sync(2, pool.clients())  # engine 1 got half of the failed sync
    assert_same(answers(pool, requests(8)), before)


def test_changed_bytes_are_named(
    pool: EnginePool, weight_sync: WeightSync, model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    seal = Sender._seal
    position = [meta.name for meta in Source(model).metadata()].index(name)

    def flip(self: Sender, bucket: Bucket, metadata: Sequence[TensorMeta], buffer: torch.Tensor) -> None:
        seal(self, bucket, metadata, buffer)
        for slab, offset in zip(bucket.slabs, bucket.offsets, strict=True):
            if slab.number == position:
                buffer[offset + 17] ^= 1

    with monkeypatch.context() as patch:
        patch.setattr(Sender, "_seal", flip)
        with pytest.raises(ChecksumError, match=name):
            weight_sync.sync(3, pool.clients())
    weight_sync.sync(3, pool.clients())
    assert len(answers(pool, requests(4))) == 4


def test_a_missing_tensor_is_named(pool: EnginePool, weight_sync: WeightSync, model: Qwen3ForCausalLM) -> None:
    source = Source(model)
    del source.tensors[-1]
    weight_sync.close()
    with pytest.raises(Fault, match=r"lack 1 of the engine's parameters, first model\.norm\.weight"):
        WeightSync(source, timeout=TIMEOUT).sync(4, pool.clients())
    weight_sync.sync(4, pool.clients())
    assert len(answers(pool, requests(4))) == 4


def test_an_untied_head_with_biases_and_an_engine_that_hangs(pool: EnginePool, tmp_path: Path) -> None:
    """One engine of another model: its log-probs are right; it hangs, is noticed, and may not be restarted."""
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).float().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)  # biases start at zero, norms at one
    save_config(model, tmp_path)
    config = RolloutConfig(num_engines=1, max_restarts=0)
    single = EnginePool(config, EngineSpec(str(tmp_path), MAX_LEN, (EOS,), threads=1), timeout=TIMEOUT)
    try:
        other = WeightSync(Source(model), timeout=TIMEOUT)
        single.wait_ready()
        for version in (1, 2):
            other.sync(version, single.clients())
            wanted = requests(16)
            assert worst_difference(model, wanted, answers(single, wanted)) < 1e-4
        os.kill(single.pids[0], signal.SIGSTOP)
        single._timeout = 4  # only now: an engine that works may be slower on a loaded machine
        done, dead = single.generate(wanted, "test")
        assert (done, dead) == ([], [0])
        with pytest.raises(EngineFault, match="no update for 4 s.*rollout.max_restarts=0"):
            single.restart(dead)
    finally:
        single.shutdown()


def test_an_engine_killed_while_it_starts_is_restarted(pool: EnginePool, spec: EngineSpec) -> None:
    def engines() -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                if child.name().startswith("ray::VllmEngine"):
                    found.append(child)
        return found

    pool.wait_ready()
    known = {engine.pid for engine in engines()}  # those of earlier tests may still be ending
    single = EnginePool(RolloutConfig(max_restarts=1), spec)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (found := [engine for engine in engines() if engine.pid not in known]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found[0].kill()
        single.wait_ready()
        assert single.pids[0] != found[0].pid
    finally:
        single.shutdown()


def test_an_engine_that_cannot_start_says_why(pool: EnginePool, tmp_path: Path) -> None:
    broken = EnginePool(RolloutConfig(num_engines=1), EngineSpec(str(tmp_path / "absent"), MAX_LEN, (EOS,)))
    try:
        with pytest.raises(EngineFault, match="rollout engine 0 could not start: .*absent"):
            broken.wait_ready()
    finally:
        broken.shutdown()


class HeadKiller(Source):
    """A source of weights in a process with its own Ray head, one process of which it kills at a chosen moment."""

    def __init__(self, model: PreTrainedModel, name: str, moment: str) -> None:
        super().__init__(model)
        self.name, self.moment = name, moment
        self.killed_at = float("inf")

    def reached(self, moment: str, after: float = 0.0) -> None:
        if moment == self.moment:
            threading.Thread(target=self.kill, args=(after,), daemon=True).start()

    def on_slab(self, number: int) -> None:
        if number == 6:
            self.reached("sync")
            time.sleep(0.1)

    def kill(self, after: float) -> None:
        while True:
            for process in psutil.Process().children():
                if process.name() == self.name:
                    time.sleep(after)
                    process.kill()
                    self.killed_at = time.monotonic()
                    return
            time.sleep(0.01)


def lose_head(name: str, moment: str, spec: EngineSpec, pipe: multiprocessing.connection.Connection) -> None:
    """Use an engine until Ray's head is found dead; send the fault, and its delay after the kill in seconds."""
    model = qwen3(0)
    source = HeadKiller(model, name, moment)
    pool = None
    if "RAY_ADDRESS" in os.environ:
        ray_cluster.RAY_START_TIMEOUT = 3.0  # Ray tries for minutes
    try:
        source.reached("start", 0.5)
        pool = EnginePool(RolloutConfig(num_engines=1, max_restarts=5), spec)
        source.reached("load", 0.5)
        pool.wait_ready()
        weight_sync = WeightSync(source, bucket_bytes=2**12, timeout=TIMEOUT)
        weight_sync.sync(1, pool.clients())
        source.reached("generate", 0.2)
        if moment == "generate":
            pool.generate(requests(400, max_tokens=200), "test")
        source.reached("restart")
        pool.restart([0])
        pool.wait_ready()
        pipe.send(("nothing was raised", 0.0))
    except Fault as fault:
        pipe.send((str(fault), time.monotonic() - source.killed_at))
    finally:
        if pool is not None:
            pool.shutdown()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("gcs_server", "start"),
        ("raylet", "start"),
        ("gcs_server", "load"),
        ("raylet", "load"),
        ("gcs_server", "sync"),
        ("raylet", "generate"),
        ("gcs_server", "restart"),
    ],
)
def test_the_death_of_rays_head_is_reported_soon(name: str, moment: str, spec: EngineSpec) -> None:
    """Ray itself would wait for a minute or for ever, or end the process without an error."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=lose_head, args=(name, moment, spec, theirs))
    process.start()
    theirs.close()
    descendants = []
    try:
        assert ours.poll(TIMEOUT), "nothing was reported"  # mostly the time that an engine needs to load
        descendants = psutil.Process(process.pid).children(recursive=True)
        message, seconds = ours.recv()
        assert f"Ray's head process {name} (pid " in message and "resume it with --resume" in message
        assert seconds < 45  # about one; Ray itself needs sixty or more
        process.join(TIMEOUT)
        assert process.exitcode in (0, 1)  # no crash; Ray itself may end a process that has lost its raylet
        assert psutil.wait_procs(descendants, timeout=TIMEOUT)[1] == []
    finally:
        process.kill()


def test_a_cluster_that_cannot_be_joined_is_named(spec: EngineSpec) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        process = spawn.Process(target=lose_head, args=("", "", spec, theirs))
        process.start()
    theirs.close()
    try:
        assert ours.poll(TIMEOUT), "nothing was reported"
        assert ours.recv()[0].startswith("the Ray cluster at RAY_ADDRESS=127.0.0.1:1 could not be joined")
    finally:
        process.kill()
