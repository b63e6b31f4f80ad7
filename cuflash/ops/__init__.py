"""One file an operation, beside its kernels in kernels_cu: choose a configuration, fill the params, launch."""
