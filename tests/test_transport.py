"""Buckets, and the broadcast of tensors over a gloo group of its own.

Proves: every byte arrives for any bucket size and number of receivers; a changed byte is named; a refusing, dying or
silent peer is an error and never a hang. Receivers are threads here, a process where one must be killed. Not proved
here: what vLLM does with the tensors (tests/test_rollout.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from megatron_entropy.transport import (
    Bucket,
    ChecksumError,
    EngineLost,
    LinkInfo,
    Receiver,
    Sender,
    TensorMeta,
    TransportError,
    plan_buckets,
)

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


class Receivers:
    """Receivers in threads, each collecting what it got and what it raised."""

    def __init__(self, sender: Sender, count: int, load: Callable[[Pairs], None] | None = None) -> None:
        self.got: list[Pairs] = [[] for _ in range(count)]
        self.errors: list[Exception | None] = [None] * count
        self._load = load
        self._threads = [threading.Thread(target=self._run, args=(sender, index)) for index in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, sender: Sender, index: int) -> None:
        try:
            receiver = Receiver(LinkInfo(**sender.init_info(1)), 1 + index)
            receiver.receive(
                metadata_of(tensors()), self._load if index == 0 and self._load else self.got[index].extend
            )
        except Exception as error:
            self.errors[index] = error

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def test_buckets_keep_order_and_size() -> None:
    metadata = [TensorMeta(f"t{index}", torch.uint8, (size,)) for index, size in enumerate([10, 10, 100, 1, 40])]
    # Starts are multiples of 16; t2 is larger than a bucket and goes alone; t3 and t4 share the last.
    assert plan_buckets(metadata, 64) == [
        Bucket(0, (0, 16), 26),
        Bucket(2, (0,), 100),
        Bucket(3, (0, 16), 56),
    ]
    assert plan_buckets([], 64) == []


# 1 byte: every tensor alone; 200: buckets of several; 1 MiB: one bucket for all.
@pytest.mark.parametrize("bucket_bytes", [1, 200, 2**20])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_every_byte_arrives(bucket_bytes: int, checksum: bool, count: int) -> None:
    sender = Sender("127.0.0.1", num_receivers=count, bucket_bytes=bucket_bytes, checksum=checksum, timeout=20)
    receivers = Receivers(sender, count)
    sender.connect()
    sender.send(metadata_of(tensors()), tensors())
    receivers.join()
    assert receivers.errors == [None] * count
    for got in receivers.got:
        assert [name for name, _ in got] == [name for name, _ in tensors()]
        for (_, arrived), (_, sent) in zip(got, tensors(), strict=True):
            assert arrived.dtype == sent.dtype and torch.equal(arrived, sent)
    sender.close()


class FlippingSender(Sender):
    """Changes one bit of tensor `transposed` after its checksum has been taken."""

    def _fill(self, bucket: Bucket, iterator: object) -> tuple[torch.Tensor, torch.Tensor]:
        buffer, sums = super()._fill(bucket, iterator)  # type: ignore[arg-type]
        if bucket.first <= 3 < bucket.first + len(bucket.offsets):
            buffer[bucket.offsets[3 - bucket.first] + 5] ^= 4
        return buffer, sums


def test_flipped_bit_is_named() -> None:
    sender = FlippingSender("127.0.0.1", num_receivers=2, bucket_bytes=200, checksum=True, timeout=20)
    receivers = Receivers(sender, 2)
    sender.connect()
    sender.send(metadata_of(tensors()), tensors())
    receivers.join()
    for error in receivers.errors:
        assert isinstance(error, ChecksumError) and str(error).startswith("transposed: ")
    sender.close()


def test_refusing_receiver_does_not_hold_up_the_others() -> None:
    def refuse(pairs: Pairs) -> None:
        raise KeyError(pairs[0][0])

    sender = Sender("127.0.0.1", num_receivers=2, bucket_bytes=1, timeout=20)
    receivers = Receivers(sender, 2, refuse)
    sender.connect()
    sender.send(metadata_of(tensors()), tensors())
    receivers.join()
    assert isinstance(receivers.errors[0], KeyError) and receivers.errors[1] is None
    assert len(receivers.got[1]) == len(tensors())
    sender.close()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_source_must_keep_to_what_it_announced(change: str) -> None:
    pairs = tensors()
    if change == "missing":
        pairs.pop()
    elif change == "extra":
        pairs.append(("more", torch.zeros(1)))
    else:
        pairs[1] = ("scalar", torch.zeros(2))
    sender = Sender("127.0.0.1", num_receivers=1, bucket_bytes=1, timeout=20)
    receivers = Receivers(sender, 1)
    sender.connect()
    with pytest.raises(ValueError, match={"missing": "integers", "extra": "more", "shape": "scalar"}[change]):
        sender.send(metadata_of(tensors()), pairs)
    sender.close()
    receivers.join()
    assert change == "extra" or isinstance(receivers.errors[0], TransportError)


def test_absent_receiver_is_an_error_in_time() -> None:
    sender = Sender("127.0.0.1", num_receivers=1, timeout=0.5)
    with pytest.raises(TransportError, match="engines to join"):
        sender.connect()


def test_waiting_can_be_called_off() -> None:
    def check() -> None:
        raise EngineLost([2], "killed")

    sender = Sender("127.0.0.1", num_receivers=1, timeout=60)
    with pytest.raises(EngineLost, match="lost rollout engine 2: killed"):
        sender.connect(check)


def receive_in_process(info: LinkInfo, arriving: object) -> None:
    arriving.set()  # type: ignore[attr-defined]
    Receiver(info, 1).receive([TensorMeta("big", torch.float32, (2**22,))] * 100, lambda pairs: time.sleep(0.1))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_or_silent_receiver_is_an_error(how: signal.Signals) -> None:
    sender = Sender("127.0.0.1", num_receivers=1, bucket_bytes=1, timeout=2)
    context = multiprocessing.get_context("spawn")
    arriving = context.Event()
    process = context.Process(target=receive_in_process, args=(LinkInfo(**sender.init_info(1)), arriving))
    process.start()
    try:
        assert arriving.wait(60)
        sender.connect()
        assert process.pid is not None
        threading.Timer(0.5, os.kill, (process.pid, how)).start()
        big = torch.zeros(2**22)
        begin = time.monotonic()
        with pytest.raises(TransportError):
            sender.send([TensorMeta("big", torch.float32, (2**22,))] * 100, [("big", big)] * 100)
        assert time.monotonic() - begin < 10
        sender.close()
    finally:
        process.kill()
        process.join()
