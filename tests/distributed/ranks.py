"""Running a function on several ranks: processes of one gloo group on this machine, each with what it returns."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, backend: str, arch: str = "sm_80") -> list[Any]:
    """What `function(*arguments)` returns on each rank, or the exception that it raises there.

    The function stands in a module; its group is the default one.
    """
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, folder, function, arguments, backend, arch), nprocs=ranks, join=True)
        return [pickle.loads((Path(folder) / f"{rank}").read_bytes()) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: Any, backend: str, arch: str
) -> None:
    os.environ["CUFLASH_BACKEND"], os.environ["CUFLASH_ARCH"] = backend, arch
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    wait = datetime.timedelta(seconds=float(os.environ.get("CUFLASH_TEST_TIMEOUT", "240")))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=wait)
    try:
        result = function(*arguments)
    except Exception as error:  # given to the test, which says whether it should be
        error.add_note("".join(traceback.format_exception(error)))
        result = error
    (Path(folder) / f"{rank}").write_bytes(pickle.dumps(result))
    # Who leaves early closes connections under a collective that another rank has not ended.
    deadline = time.monotonic() + 20
    while len(list(Path(folder).glob("[0-9]*"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.02)
    dist.destroy_process_group()


def values(results: list[Any]) -> list[Any]:
    """`results` without exceptions: the first is raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
