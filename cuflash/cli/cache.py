"""`cuflash cache`: what is kept on disk, and deleting it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .doctor import described


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete the compiled kernels; what is used is built again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say which kernels are kept on disk and how large they are, or delete them.

    The folder is CUFLASH_CACHE_DIR, or the user's cache folder. Other processes may run meanwhile. What cuflash did not
    compile stays, the demo's encoder among it.
    """
    from ..jit import cache as kept

    files, freed = kept.clear() if clear else (0, 0)
    held = kept.usage()
    if as_json:
        sizes = {"kernels": held.payloads, "kernel_bytes": held.payload_bytes, "other_bytes": held.other_bytes}
        print(json.dumps({"folder": str(held.folder), **sizes, "deleted_files": files, "deleted_bytes": freed}))
        return
    if clear:
        print(f"deleted {files} files, {freed / 1e6:.1f} MB")
    print(f"{held.folder}: {described(held)}")
