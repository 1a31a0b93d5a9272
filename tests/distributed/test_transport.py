"""Buckets, and the transfer of tensors over gloo, through shared memory, and through what stands for a GPU's memory.

Proves: every byte arrives for any bucket size and number of receivers, and stays as it is while later buckets arrive;
a changed byte is named; a refusing, dying or silent peer is an error and never a hang. Receivers are threads here, a
process where one must be killed. Not proved here: what vLLM does with the tensors (tests/engines/test_rollout.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import host_ipc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropy.errors import ChecksumError, EngineLost, TransportError
from megatron_entropy.weights.buckets import Bucket, Slab, TensorMeta, plan_buckets
from megatron_entropy.weights.device_memory import DeviceMemory
from megatron_entropy.weights.links import LinkInfo, SharedMemory, open_memory
from megatron_entropy.weights.transport import Receiver, Sender

on_every_link = pytest.mark.parametrize("backend", ["gloo", "shared_memory", "cuda_ipc"])


@pytest.fixture(autouse=True)
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("allocate", "map_handle", "view"):
        monkeypatch.setattr(f"megatron_entropy.weights.device_memory.{name}", getattr(host_ipc, name))


Pairs = list[tuple[str, torch.Tensor]]


def tensors() -> Pairs:
    """Several types and shapes: a scalar, odd sizes that need alignment, a transposed view, a large one."""
    generator = torch.Generator().manual_seed(0)
    return [
        ("odd", torch.randn(7, 3, generator=generator).bfloat16()),
        ("scalar", torch.tensor(3.5)),
        ("bytes", torch.arange(5, dtype=torch.uint8)),
        ("transposed", torch.randn(6, 11, generator=generator).t()),
        ("large", torch.randn(40, 40, generator=generator)),
        ("integers", torch.arange(9)),
    ]


def metadata_of(pairs: Pairs) -> list[TensorMeta]:
    return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs]


def reader(pairs: Pairs) -> Callable[[Slab, torch.Tensor], None]:
    """Reads slabs from tensors in memory."""

    def read(slab: Slab, out: torch.Tensor) -> None:
        tensor = pairs[slab.number][1]
        rows = tensor.reshape(1, *tensor.shape[1:]) if tensor.ndim == 0 else tensor
        out.copy_(rows[slab.first : slab.first + slab.rows])

    return read


class Receivers:
    """Receivers in threads, each collecting what it got and what it raised."""

    def __init__(self, sender: Sender, count: int, load: Callable[[Pairs], None] | None = None) -> None:
        self.got: list[Pairs] = [[] for _ in range(count)]
        self.errors: list[Exception | None] = [None] * count
        self._load = load
        self._receivers: list[Receiver] = []  # kept: one that leaves breaks the group while another still joins
        self._threads = [threading.Thread(target=self._run, args=(sender, index)) for index in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, sender: Sender, index: int) -> None:
        try:
            receiver = Receiver(LinkInfo(**sender.init_info(1)), 1 + index)
            self._receivers.append(receiver)
            receiver.receive(
                metadata_of(tensors()), self._load if index == 0 and self._load else self.got[index].extend
            )
        except Exception as error:
            self.errors[index] = error

    def join(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        for receiver in self._receivers:
            receiver.close()


def test_buckets_keep_order_and_size() -> None:
    metadata = [TensorMeta(f"t{index}", torch.uint8, shape) for index, shape in enumerate([(10,), (4, 5), (100,), ()])]
    # A slab has at most 64 / 8 bytes, but one row at least; starts are multiples of 16; 56 bytes of slabs to a bucket.
    assert plan_buckets(metadata[:2], 64) == [
        Bucket((Slab(0, 0, 8), Slab(0, 8, 2), Slab(1, 0, 1), Slab(1, 1, 1)), (0, 16, 32, 48), 53),
        Bucket((Slab(1, 2, 1), Slab(1, 3, 1)), (0, 16), 21),
    ]
    assert plan_buckets(metadata[3:], 64) == [Bucket((Slab(0, 0, 1),), (0,), 1)]
    assert plan_buckets([], 64) == []


@given(
    st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=8),
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    st.integers(8, 5000),
)
def test_buckets_cover_every_row_once_within_their_size(
    shapes: list[list[int]], dtype: torch.dtype, bucket_bytes: int
) -> None:
    metadata = [TensorMeta(str(index), dtype, tuple(shape)) for index, shape in enumerate(shapes)]
    covered: list[list[int]] = [[] for _ in metadata]
    for bucket in plan_buckets(metadata, bucket_bytes):
        ends = []
        for slab, offset in zip(bucket.slabs, bucket.offsets, strict=True):
            meta = metadata[slab.number]
            row_bytes = meta.num_bytes // max(meta.shape[0] if meta.shape else 1, 1)
            covered[slab.number] += range(slab.first, slab.first + slab.rows)
            assert offset % 16 == 0 and offset >= max(ends, default=0)
            ends.append(offset + slab.rows * row_bytes)
            assert slab.rows * row_bytes <= max(bucket_bytes // 8, row_bytes)
        assert ends[-1] == bucket.num_bytes and (bucket.num_bytes <= bucket_bytes or len(bucket.slabs) == 1)
    assert covered == [list(range(meta.shape[0] if meta.shape else 1)) for meta in metadata]


# 1 byte: every row alone; 200: buckets of several slabs; 1 MiB: one bucket for all.
@pytest.mark.parametrize("bucket_bytes", [1, 200, 2**20])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@on_every_link
def test_every_byte_arrives(bucket_bytes: int, checksum: bool, count: int, backend: str) -> None:
    sender = Sender(
        "127.0.0.1", num_receivers=count, bucket_bytes=bucket_bytes, checksum=checksum, timeout=60, backend=backend
    )
    receivers = Receivers(sender, count)
    sender.connect()
    sender.send(metadata_of(tensors()), reader(tensors()))
    receivers.join()
    assert receivers.errors == [None] * count
    for got in receivers.got:
        assert [name for name, _ in got] == [name for name, _ in tensors()]
        for (_, arrived), (_, sent) in zip(got, tensors(), strict=True):
            assert arrived.dtype == sent.dtype and torch.equal(arrived, sent)
    sender.close()


class FlippingSender(Sender):
    """Changes one bit of tensor `transposed` after its checksum has been taken."""

    def _seal(self, bucket: Bucket, metadata: Sequence[TensorMeta], buffer: torch.Tensor) -> None:
        super()._seal(bucket, metadata, buffer)
        for slab, offset in zip(bucket.slabs, bucket.offsets, strict=True):
            if slab.number == 3:
                buffer[offset + 5] ^= 4


@on_every_link
def test_flipped_bit_is_named(backend: str) -> None:
    sender = FlippingSender("127.0.0.1", num_receivers=2, bucket_bytes=200, checksum=True, timeout=60, backend=backend)
    receivers = Receivers(sender, 2)
    sender.connect()
    sender.send(metadata_of(tensors()), reader(tensors()))
    receivers.join()
    for error in receivers.errors:
        assert isinstance(error, ChecksumError) and str(error).startswith("transposed: ")
    sender.close()


@on_every_link
def test_refusing_receiver_does_not_hold_up_the_others(backend: str) -> None:
    def refuse(pairs: Pairs) -> None:
        raise KeyError(pairs[0][0])

    sender = Sender("127.0.0.1", num_receivers=2, bucket_bytes=1, timeout=60, backend=backend)
    receivers = Receivers(sender, 2, refuse)
    sender.connect()
    sender.send(metadata_of(tensors()), reader(tensors()))
    receivers.join()
    assert isinstance(receivers.errors[0], KeyError) and receivers.errors[1] is None
    assert len(receivers.got[1]) == len(tensors())
    sender.close()


def test_memory_of_another_machine_is_named() -> None:
    with pytest.raises(TransportError, match=r"cannot open .*/proc/1/fd/none.*set rollout.weight_transfer to 'gloo'"):
        SharedMemory("/proc/1/fd/none")


def assert_the_same(made: SharedMemory | DeviceMemory, seen: SharedMemory | DeviceMemory, size: int) -> None:
    """What is written into one is in the other, and the buffers are aligned for any type."""
    for mine, theirs in zip(made.buffers(size), seen.buffers(size), strict=True):
        assert len(mine) == len(theirs) == size
        mine.copy_(torch.arange(size) % 251)
        assert torch.equal(mine, theirs)
        mine[: size // 8 * 8].view(torch.int64)


def test_shared_memory_is_the_same_for_all_and_grows() -> None:
    made = SharedMemory()
    seen = open_memory(made.path)
    for size in (5, 10_000):
        assert_the_same(made, seen, size)
    made.close()
    seen.close()


def test_device_memory_is_the_same_for_all_and_is_kept() -> None:
    made = DeviceMemory(size=1000)
    seen = open_memory(made.path)
    for size in (5, 1000):
        assert_the_same(made, seen, size)
    with pytest.raises(AssertionError, match="a bucket of 2000 bytes, but the memory is for 1024"):
        made.buffers(2000)
    made.close()
    again = DeviceMemory(size=1000)
    assert again.buffers(5)[0].tolist() == seen.buffers(5)[0].tolist(), "the same memory"
    assert seen.is_at(made.path) and not seen.is_at(again.path)


def test_device_memory_without_cuda_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the stand-in
    with pytest.raises(TransportError, match=r"set (rollout\.)?weight_transfer to 'shared_memory'"):
        DeviceMemory(size=1000)


def test_absent_receiver_is_an_error_in_time() -> None:
    sender = Sender("127.0.0.1", num_receivers=1, timeout=0.5)
    with pytest.raises(TransportError, match="engines to join"):
        sender.connect()


@on_every_link
def test_receiver_that_fails_leaves_at_once(backend: str) -> None:
    sender = Sender("127.0.0.1", num_receivers=1, bucket_bytes=64, timeout=60, backend=backend)
    failed: list[BaseException] = []

    def receive() -> None:
        receiver = Receiver(LinkInfo(**sender.init_info(1)), 1)
        receiver._link.finish = None  # type: ignore[union-attr, assignment, method-assign]
        try:
            receiver.receive(metadata_of(tensors()), print)
        except TypeError as error:
            failed.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    sender.connect()
    with pytest.raises(TransportError, match="weight transfer broke"):  # a timeout would say "waited 60 s"
        sender.send(metadata_of(tensors()), reader(tensors()))
    sender.close()
    thread.join()
    assert len(failed) == 1


def test_closed_sender_frees_those_who_wait_for_others() -> None:
    sender = Sender("127.0.0.1", num_receivers=2, timeout=60)
    failed: list[BaseException] = []

    def join() -> None:
        try:
            Receiver(LinkInfo(**sender.init_info(1)), 1)
        except TransportError as error:
            failed.append(error)

    thread = threading.Thread(target=join)
    thread.start()

    def check() -> None:
        if sender._store.check(["machine/1"]):
            raise EngineLost([2], "killed")

    with pytest.raises(EngineLost):
        sender.connect(check)
    sender.close()
    thread.join(120)
    assert len(failed) == 1


def test_waiting_can_be_ended() -> None:
    def check() -> None:
        raise EngineLost([2], "killed")

    sender = Sender("127.0.0.1", num_receivers=1, timeout=60)
    with pytest.raises(EngineLost, match="lost rollout engine 2: killed"):
        sender.connect(check)


@on_every_link
def test_closing_does_not_wait_for_a_receiver_that_never_comes(backend: str) -> None:
    """Ray's head dies, the engine lives: it has joined and will never be asked to receive."""
    sender = Sender("127.0.0.1", num_receivers=1, bucket_bytes=64, timeout=20, backend=backend)
    receivers: list[Receiver] = []
    thread = threading.Thread(target=lambda: receivers.append(Receiver(LinkInfo(**sender.init_info(1)), 1)))
    thread.start()
    sender.connect()
    thread.join()

    def check() -> None:
        raise EngineLost([0], "nobody can be called")

    begin = time.monotonic()
    with pytest.raises(EngineLost):
        sender.send(metadata_of(tensors()), reader(tensors()), check)
    sender.close()
    assert time.monotonic() - begin < 15, "it waited for the receiver, for the timeout of 20 s"
    receivers[0].close()


def receive_in_process(info: LinkInfo, arriving: object) -> None:
    arriving.set()  # type: ignore[attr-defined]
    Receiver(info, 1).receive([TensorMeta("big", torch.float32, (1, 2**22))] * 100, lambda pairs: None)


@pytest.mark.parametrize(
    "how, timeout, message",
    [
        (signal.SIGKILL, 8, "weight transfer broke|waited 8 s for a bucket"),  # gloo does not notice every death
        (signal.SIGSTOP, 2, "waited 2 s for a bucket|weight transfer broke"),  # ours or gloo's own timeout
    ],
)
@on_every_link
def test_dead_or_silent_receiver_is_an_error(how: signal.Signals, timeout: float, message: str, backend: str) -> None:
    sender = Sender("127.0.0.1", num_receivers=1, bucket_bytes=1, timeout=timeout, backend=backend)
    context = multiprocessing.get_context("spawn")
    arriving = context.Event()
    process = context.Process(target=receive_in_process, args=(LinkInfo(**sender.init_info(1)), arriving))
    process.start()
    try:
        assert arriving.wait(120)
        sender.connect()
        read = reader([("big", torch.zeros(1, 2**22))] * 100)

        def read_and_signal(slab: Slab, out: torch.Tensor) -> None:
            if slab.number == 10:
                assert process.pid is not None
                os.kill(process.pid, how)
            read(slab, out)

        with pytest.raises(TransportError, match=message):
            sender.send([TensorMeta("big", torch.float32, (1, 2**22))] * 100, read_and_signal)
        sender.close()
    finally:
        process.kill()
        process.join()
