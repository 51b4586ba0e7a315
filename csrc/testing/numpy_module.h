// The parts of the module of raw kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/kernels.h"

namespace widenet {

// "": the best level; a level that this CPU cannot run is an error.
const Kernels& kernels_of(const std::string& level);

void add_gemm(pybind11::module_& m);

}  // namespace widenet
