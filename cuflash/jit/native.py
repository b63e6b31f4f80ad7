"""What Python and the emulator's runtime tell each other: the structs of kernels_cu/hw_emu/interface.cpp."""

from __future__ import annotations

import ctypes


class Control(ctypes.Structure):  # there CuflashEmuControl, and so on
    _fields_ = (("stop", ctypes.c_int32), ("done", ctypes.c_uint64))


class Buffer(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_int32),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("smem_bytes", ctypes.c_uint32),
        ("buffer_count", ctypes.c_int32),
        ("buffers", ctypes.POINTER(Buffer)),
        ("seed", ctypes.c_uint64),
        ("step_limit", ctypes.c_uint64),
        ("early_landing", ctypes.c_int32),
        ("counting", ctypes.c_int32),
        ("os_threads", ctypes.c_int32),
        ("clocked", ctypes.c_int32),
        ("event_limit", ctypes.c_uint64),
        ("cluster", ctypes.c_int32),
        ("control", ctypes.POINTER(Control)),
    )


class Event(ctypes.Structure):
    _fields_ = (
        ("tick", ctypes.c_uint64),
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("what", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("warp", ctypes.c_int32),
        ("lanes", ctypes.c_int32),
        ("object", ctypes.c_int32),
        ("phase", ctypes.c_int32),
        ("passed", ctypes.c_int32),
    )


class Result(ctypes.Structure):
    _fields_ = (
        ("report", ctypes.c_char_p),
        ("counters", ctypes.c_char_p),
        ("events", ctypes.POINTER(Event)),
        ("event_count", ctypes.c_uint64),
        ("dropped", ctypes.c_uint64),
    )
