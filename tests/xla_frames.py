"""Call frames as XLA makes them, with a table of functions that tests implement: the handler is called by hand."""

from __future__ import annotations

import ctypes

from cuflash.autograd import jax_ffi

STREAM = 0x57EA
ERROR = 0xE44  # the address of "XLA's" error


class Xla:
    """One call's frame, and the functions that a handler may ask for."""

    def __init__(
        self, description: jax_ffi.Description, inputs: list[int], results: list[int], stream: int = STREAM
    ) -> None:
        self.errors: list[tuple[str, int]] = []
        self.stream = stream
        text = description.dumps().encode()
        self.keep = [text, jax_ffi._function(self.stream_get), jax_ffi._function(self.error_create)]
        api = jax_ffi._Api(
            stream_get=ctypes.cast(self.keep[1], ctypes.c_void_p),
            error_create=ctypes.cast(self.keep[2], ctypes.c_void_p),
        )
        api.version.major, api.version.minor = 7, 11
        span = jax_ffi._Span(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))
        attributes = jax_ffi._Attributes(size=1, values=(ctypes.POINTER(jax_ffi._Span) * 1)(ctypes.pointer(span)))
        self.frame = jax_ffi._Frame(
            api=ctypes.pointer(api), stage=3, args=self.buffers(inputs), results=self.buffers(results),
            attributes=attributes,
        )  # fmt: skip

    def buffers(self, addresses: list[int]) -> jax_ffi._Buffers:
        made = [ctypes.pointer(jax_ffi._Buffer(data=address)) for address in addresses]
        array = (ctypes.POINTER(jax_ffi._Buffer) * len(made))(*made)
        self.keep += [array, *made]
        return jax_ffi._Buffers(size=len(made), buffers=array)

    def stream_get(self, address: int) -> None:
        jax_ffi._StreamArgs.from_address(address).stream = self.stream

    def error_create(self, address: int) -> int:
        args = jax_ffi._ErrorArgs.from_address(address)
        self.errors.append((args.message.decode(), args.code))
        return ERROR

    def call(self, platform: str) -> int | None:
        return jax_ffi._HANDLERS[platform](ctypes.pointer(self.frame))
