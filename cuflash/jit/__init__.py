"""From the CUDA C sources to something that can be launched.

source    one string per kernel, flattened from kernels_cu/
variant   the compile-time choices, as the text of `struct Variant`
layout    the launch parameters: byte layout of the structs in kernels_cu/params/
nvrtc     string -> cubin          hostcxx   string -> shared object for the emulator
cache     compiled files on disk, each built once a machine
progress  says on stderr what one waits for
module    KernelSpec -> Kernel, and its launch
emulated  launches on the emulator: native, what its runtime is told; schedule, counters, events, what callers ask of it
sass      reads the machine code of a cubin
"""
