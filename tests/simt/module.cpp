// The Python side of the simulator: run(kernel, inputs, outputs, scalars, ...) on numpy arrays, in place.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime/fiber.h"
#include "runtime/run.h"

namespace py = pybind11;

namespace {

// The memory that an array spans; a view with gaps spans them too.
simt::Region region_of(const std::string& name, const py::array& array, bool writable, bool initialised) {
  char* low = static_cast<char*>(const_cast<void*>(array.data()));
  char* high = low + array.itemsize();
  for (py::ssize_t d = 0; d < array.ndim(); ++d) {
    if (array.shape(d) == 0) high = low;
    const py::ssize_t reach = std::max<py::ssize_t>(array.shape(d) - 1, 0) * array.strides(d);
    (reach < 0 ? low : high) += reach;
  }
  simt::Region region;
  region.begin = low;
  region.bytes = static_cast<size_t>(std::max<ptrdiff_t>(high - low, 0));
  region.name = name;
  region.writable = writable;
  if (simt::tracking && writable) {
    region.cells.resize(region.bytes);
    for (simt::Cell& cell : region.cells) cell.initialised = initialised;
  }
  return region;
}

simt::Schedule schedule_of(const std::string& name) {
  if (name == "lockstep") return simt::Schedule::kLockstep;
  if (name == "reversed") return simt::Schedule::kReversed;
  if (name == "run-ahead") return simt::Schedule::kRunAhead;
  if (name == "shuffle") return simt::Schedule::kShuffle;
  throw py::value_error("schedule: expected lockstep, reversed, run-ahead or shuffle, got '" + name + "'");
}

void run(const std::string& kernel, const std::map<std::string, py::array>& inputs,
         const std::map<std::string, py::array>& outputs, const std::map<std::string, py::array>& fresh,
         const py::dict& scalars, const std::string& schedule, bool copies_land_early, unsigned resident,
         uint64_t seed, bool truncated_products) {
  const auto found = simt::runners().find(kernel);
  if (found == simt::runners().end()) throw py::key_error("no runner is registered for '" + kernel + "'");
  simt::Arguments arguments;
  std::deque<simt::Region> regions;
  const auto add = [&](const std::map<std::string, py::array>& arrays, bool writable, bool initialised) {
    for (const auto& [name, array] : arrays) {
      if (writable && !array.writeable()) throw py::value_error("array '" + name + "' is read-only");
      regions.push_back(region_of(name, array, writable, initialised));
      arguments.arrays[name] = {const_cast<void*>(array.data()), static_cast<size_t>(array.itemsize())};
    }
  };
  add(inputs, false, true);
  add(outputs, true, true);
  add(fresh, true, false);
  for (const auto& [name, value] : scalars) {
    if (py::isinstance<py::str>(value))
      arguments.texts[py::cast<std::string>(name)] = py::cast<std::string>(value);
    else
      arguments.integers[py::cast<std::string>(name)] = py::cast<int64_t>(value);
  }
  simt::Options options;
  options.schedule = schedule_of(schedule);
  options.copies_land_early = copies_land_early;
  options.resident = resident;
  options.seed = seed;
  options.truncated_products = truncated_products;
  simt::run(found->second, arguments, options, std::move(regions));
}

}  // namespace

PYBIND11_MODULE(resona_simt, module) {
  // Each build has a class of its own: pybind11 would otherwise share the first one among them.
  static PyObject* error = PyErr_NewException("resona_simt.SimulationError", PyExc_RuntimeError, nullptr);
  module.attr("SimulationError") = py::reinterpret_borrow<py::object>(error);
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const simt::Error& e) {
      PyErr_SetString(error, e.what());
    }
  });
  module.def("run", &run, py::arg("kernel"), py::arg("inputs"), py::arg("outputs"), py::arg("fresh"),
             py::arg("scalars"), py::arg("schedule"), py::arg("copies_land_early"), py::arg("resident"),
             py::arg("seed"), py::arg("truncated_products"));
  module.def("release_stacks", &simt::release_stacks);
  module.def("tracks_races", [] { return simt::tracking; });
}
