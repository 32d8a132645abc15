"""A process that dies ends the others, with an error and at once; all stay on loopback and leave no port behind."""

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from processes import begin, processes

from manyheads.parallel import Layout, heads_attention, ring_attention, state_attention, windowed_attention


def window_attention(q, k, v, layout):
    return windowed_attention(q, k, v, layout, [3] * q.shape[1])


SCHEMES = {
    "ring": ring_attention,
    "states": state_attention,
    "heads": heads_attention,
    "halo": window_attention,
}


def dies(folder: Path, rank: int, size: int, scheme: str) -> None:
    """The last process is gone after one call that went well; each of the others writes what it was told."""
    begin(folder, rank, size)
    layout = Layout(12, "contiguous")
    x = layout.shard(torch.randn(1, 3, 12, 4), 2).requires_grad_()
    SCHEMES[scheme](x, x, x, layout).sum().backward()
    if rank == size - 1:
        (folder / "died").write_text(str(time.monotonic()))
        os._exit(7)
    (folder / f"{rank}.json").write_text(json.dumps(listening()))
    try:
        # Backward too: the first process needs nothing that stands before its tokens.
        SCHEMES[scheme](x, x, x, layout).sum().backward()
    except RuntimeError as error:
        (folder / f"{rank}.txt").write_text(f"{time.monotonic()} {error}")
        os._exit(3)


def listening() -> list[tuple[str, int]]:
    """Addresses and ports at which this process waits for others, from the kernel's tables."""
    mine = set()
    for handle in Path("/proc/self/fd").iterdir():
        try:
            mine.add(str(handle.readlink()))
        except OSError:  # the handle of this very listing
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in mine:
                address, port = local.split(":")
                found.append((address, int(port, 16)))
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_process_that_dies_ends_the_others(tmp_path: Path, scheme: str) -> None:
    assert processes(dies, tmp_path, 3, scheme) == [3, 3, 7]
    died = float((tmp_path / "died").read_text())
    ports = []
    for rank in range(2):
        ended, told = (tmp_path / f"{rank}.txt").read_text().split(" ", 1)
        assert float(ended) - died < 30  # one clock for all processes of a machine
        assert f"process {rank} of 3 lost another one" in told
        assert re.search(r"process (\d, )?2 has ended", told)
        ports += json.loads((tmp_path / f"{rank}.json").read_text())
    assert ports
    for address, port in ports:
        assert address == "0100007F"  # 127.0.0.1
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
