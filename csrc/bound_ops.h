// The ops as methods of one object that knows the parameters, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fuse_ext {

// Adds the class Layout and is_observed() to the module.
void define_bound_ops(pybind11::module_& m);

}  // namespace fuse_ext
