"""Send tensors from one node to receivers on others: `transfer.py FILE RANK RECEIVERS`; rank 0 sends.

Prints the seconds of the transfer.
"""

import json
import sys
import time
from pathlib import Path

import torch

from megatron_entropy.weights.buckets import Slab, TensorMeta
from megatron_entropy.weights.links import LinkInfo
from megatron_entropy.weights.transport import Receiver, Sender

METADATA = [TensorMeta(f"t{number}", torch.float32, (1024, 2048)) for number in range(16)]
MODEL_BYTES = sum(meta.num_bytes for meta in METADATA)
BUCKET_BYTES = 2**23


def main() -> None:
    file, rank, receivers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if rank == 0:
        options = {"num_receivers": receivers, "bucket_bytes": BUCKET_BYTES, "checksum": True, "timeout": 60.0}
        sender = Sender("10.77.0.1", **options)
        file.with_suffix(".new").write_text(json.dumps(sender.init_info(0)))
        file.with_suffix(".new").rename(file)
        sender.connect()
        weights = torch.rand(1024, 2048)

        def read(slab: Slab, out: torch.Tensor) -> None:
            out.copy_(weights[slab.first : slab.first + slab.rows])

        begin = time.monotonic()
        sender.send(METADATA, read)
        print(f"{time.monotonic() - begin:.2f}")
        while len(list(file.parent.glob("done.*"))) < receivers:  # one that leaves early breaks the group
            time.sleep(0.05)
        return
    while not file.exists():
        time.sleep(0.05)
    arrived = []
    receiver = Receiver(LinkInfo(**json.loads(file.read_text())), rank)
    receiver.receive(METADATA, lambda tensors: arrived.extend(name for name, _ in tensors))
    assert arrived == [meta.name for meta in METADATA]
    (file.parent / f"done.{rank}").touch()
    while len(list(file.parent.glob("done.*"))) < receivers:
        time.sleep(0.05)


main()
