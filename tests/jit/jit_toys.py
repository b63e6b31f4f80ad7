"""Small kernels and helpers the tests of cuflash.jit share. Importable by the processes they start."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from cuflash import arch
from cuflash.jit import layout, module, source

TOY = str(Path(__file__).with_name("toy.cu"))
SM80 = arch.named("sm_80")


@dataclass(frozen=True)
class ToyVariant:
    factor: int = 3
    threads: int = 32
    element: str = "hw::Half"

    def members(self) -> dict[str, str | int | bool]:
        return {"Element": self.element, "kThreads": self.threads, "kFactor": self.factor}


def toy_spec(
    entry: str = "cuflash_toy_scale", factor: int = 3, edits: tuple[source.Edit, ...] = ()
) -> module.KernelSpec:
    smem_bytes = 512 if entry == "cuflash_toy_matrix" else 0
    return module.KernelSpec(TOY, entry, "ToyParams", ToyVariant(factor), 32, smem_bytes, edits)


def toy_layout() -> layout.Layout:
    return layout.parse(source.read(Path(TOY)), "ToyParams")


def fork() -> int:
    """`os.fork`, without what Python and JAX warn of: other threads, which are the point of the tests that fork."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def build_in_cache(folder: str, key: str, log: str, payload: bytes = b"payload" * 1000) -> str:
    """Builds one entry slowly, noting every build as a line in `log`: for a process of its own."""
    import time

    from cuflash.jit import cache
    from cuflash.settings import config

    config.cache_dir = folder

    def make() -> bytes:
        with open(log, "a") as file:
            file.write(f"{key} {os.getpid()}\n")
        time.sleep(0.2)
        return payload

    path = cache.build("test", key, ".bin", make)
    assert path.read_bytes() == payload
    return str(path)


def compile_toys(folder: str, factors: list[int]) -> list[tuple[str, bool]]:
    """(cubin path, was it cached) of the toy with each factor: for a process of its own."""
    from cuflash.settings import config

    config.cache_dir = folder
    compiled = [module.compile(toy_spec(factor=f), SM80) for f in factors]
    return [(str(c.path), c.cached) for c in compiled]


def die_while_building(folder: str, key: str) -> None:
    """Ends this process, without a clean-up of any kind, while it holds a lock and a half-written file."""
    from cuflash.jit import cache
    from cuflash.settings import config

    config.cache_dir = folder

    def make() -> bytes:
        (Path(folder) / "test" / ".tmp-half").write_bytes(b"half")
        sys.stdout.flush()
        os._exit(9)

    cache.build("test", key, ".bin", make)
