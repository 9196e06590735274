"""The forward pass in C++ kernels that are compiled for this machine."""
