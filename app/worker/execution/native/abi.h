// The C ABI that the Python bindings check when a library is loaded (native_build.py).
//
// Every library exports `llmk_abi_version`, and `llmk_layout_<name>` for each structure that Python mirrors: a table of
// the number of fields, the size of the structure, and the offset and size of each field, in bytes.  LLMK_ABI_VERSION
// changes with the meaning or the order of a function's parameters, which no table shows.

#pragma once

#include <cstddef>
#include <cstdint>

#define LLMK_ABI_VERSION 1

#define LLMK_FIELD(T, field) offsetof(T, field), sizeof(T::field)

extern "C" int32_t llmk_abi_version() { return LLMK_ABI_VERSION; }
