"""Mistakes on the host's side, each put into the shipped text: a scenario notices every one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import stand_in

# What goes wrong: the file, its text, the text instead, and the scenario that notices.
MISTAKES = {
    "a graph's workspace returns to the pool": (
        "call/run.py", "framework.keep_recorded(taken.values(), device[1])", "pass",
        "a_replay_writes_to_nobodys_memory",
    ),
    "workspace is freed before the launch": (
        "call/run.py", "        views |= taken\n",
        "        from dataclasses import replace\n"
        "        views |= {name: replace(x, owner=None) for name, x in taken.items()}\n        del taken; taken = {}\n"
        "        framework.empty((1 << 12,), dtypes.float32, device).owner.set(np.ones(1 << 12, np.float32))\n",
        "a_cache_with_lengths_of_its_own",
    ),
    "no context in a thread": (
        "jit/tensor_map.py", "with driver.context(device):", "if True:", "a_thread_that_has_not_used_cuda",
    ),
    "an append's workspace returns to the pool": (
        "call/run.py", "framework.keep_recorded(taken.values(), device[1])", "pass", "an_append_in_a_graph",
    ),
    "host values that found no room have no name": (
        "call/run.py", "except DeviceMemoryError as error:", "except ZeroDivisionError as error:",
        "no_memory_for_host_lengths",
    ),
    "results are allocated when the caches are written": (
        "call/cache.py", "        take_results(framework, prepared.results, views, device)", "        pass",
        "no_memory_for_an_append",
    ),
    "kernels are loaded when the caches are written": (
        "call/prepare.py", '"cuda", index).prepare()', '"cuda", index)', "a_module_of_an_append_is_not_loaded",
    ),
    "a refused allocation has no name": (
        "frameworks/cupy.py", "if status == _CAPTURED:", "if False:", "no_memory_while_a_stream_is_captured",
    ),
    "an event of a capture is asked": (
        "frameworks/cupy.py", "    if capturing(device):\n        return\n", "", "a_producer_under_capture",
    ),
    "an event is asked while another thread captures": (
        "frameworks/cupy.py", "with driver.unwatched():", "if True:", "a_capture_while_another_thread_works",
    ),
    "a module is loaded under capture": (
        "jit/module.py", "with cupy.cuda.Device(self.device), driver.unwatched():",
        "with cupy.cuda.Device(self.device):", "a_first_call_under_capture",
    ),
    "a failed kernel is the caller's argument": (
        "jit/tensor_map.py", "if status == driver.INVALID_VALUE:", "if status:", "a_kernel_fails",
    ),
    "another stream": (
        "call/run.py", "framework.stream(device[1])}\n        plan.launch", "0}\n        plan.launch",
        "a_stream_of_the_callers",
    ),
    "another device": (
        "jit/module.py", "if current_device() == kernel.device:", "if True:", "a_device_that_is_not_current",
    ),
    "results on another device": (
        "frameworks/cupy.py", "if cupy.cuda.runtime.getDevice() == index:", "if True:",
        "a_device_that_is_not_current",
    ),
    "shared memory is not allowed": (
        "jit/module.py", "if self.spec.smem_bytes > DEFAULT_SMEM_BYTES:", "if False:", "a_stream_of_the_callers",
    ),
    "params are shifted": (
        "jit/module.py", "ctypes.create_string_buffer(params, len(params))",
        "ctypes.create_string_buffer(params[1:], len(params))", "a_stream_of_the_callers",
    ),
    "a producer's arrays are not kept alive": (
        "frameworks/dlpack.py", "retain = _cupy.retain_until_done", "retain = _cupy.retain",
        "arrays_of_a_producer_that_die_after_the_call",
    ),
    "a producer waits for another stream": (
        "frameworks/dlpack.py", "stream=stream(device[1]) or 1", "stream=1",
        "arrays_that_a_producer_still_writes",
    ),
    "a map of another array": (
        "ops/forward.py", '("k", k, p.head_dim, self', '("k", v, p.head_dim, self', "a_stream_of_the_callers",
    ),
    "lengths are copied on another stream": (
        "frameworks/cupy.py", "values.nbytes, cupy.cuda.get_current_stream())",
        "values.nbytes, cupy.cuda.Stream.null)", "host_lengths",
    ),
    "host values enter a graph": (
        "call/bind.py", "if uploads and framework.capturing(prepared.device[1]):", "if False:",
        "host_lengths_under_capture",
    ),
    "a launch writes a number down": (
        "call/cache_prepare.py", "    by_value = options.counted and", "    by_value = False and",
        "a_number_of_keys_is_no_array",
    ),
    "another stream of PyTorch's": (
        "frameworks/torch.py", "return torch._C._cuda_getCurrentRawStream(device)", "return 0",
        "torch_on_its_stream_and_device",
    ),
    "PyTorch's results on another device": (
        "frameworks/torch.py", 'torch.device("cuda", device[1]) if device[0] == "cuda" else torch.device("cpu")\n'
        "    return view(", 'torch.device("cuda", 0)\n    return view(', "torch_on_its_stream_and_device",
    ),
    "another stream of XLA's": (
        "autograd/jax_ffi.py", "return args.stream or 0", "return 0", "jax_on_xlas_thread",
    ),
    "another device of XLA's": (
        "autograd/jax_ffi.py", '("cuda", cupy.current_device())', '("cuda", 0)', "jax_on_xlas_thread",
    ),
}  # fmt: skip


def start(*arguments: str, chip: str = "") -> subprocess.CompletedProcess[str]:
    """A scenario in a process of its own, on a chip of another compute capability if one is named."""
    command = [sys.executable, "-m", "fake_cuda.planted", *arguments]
    environment = os.environ | ({stand_in.VARIABLE: f"stand-in:{chip}"} if chip else {})
    folder = Path(__file__).parents[1]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("chip", ["8.6", "8.9", "12.0"])
def test_another_chip(chip):
    run = start("a_cache_with_lengths_of_its_own", chip=chip)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_noticed(what):
    file, old, new, scenario = MISTAKES[what]
    if (framework := scenario.partition("_")[0]) in ("torch", "jax"):
        pytest.importorskip(framework)
    run = start(scenario, file, old, new)
    assert run.returncode == 1 and "and not once" not in run.stderr, run.stdout + run.stderr
