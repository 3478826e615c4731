#include "state.h"

namespace wgan_ext {
namespace {

namespace py = pybind11;

// Made once: making a string takes as long as looking an attribute up.
struct Names {
  py::object dict = name("__dict__"), shape = name("shape"), dtype = name("dtype");
  py::object parameters = name("_parameters"), buffers = name("_buffers"), modules = name("_modules");

  static py::object name(const char* text) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
  }
  static const Names& all() {
    static const Names* names = new Names;  // never freed: Python may be gone before statics are
    return *names;
  }
};

class Walk {
 public:
  py::list state;

  Walk(const py::frozenset& atoms, const py::frozenset& ignored, const py::function& frozen)
      : atoms_(atoms), ignored_(ignored), frozen_(frozen) {}

  void visit(py::handle module) {
    add(py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(module.ptr())));
    add(py::type::handle_of(module));
    const py::object attributes = module.attr(names_.dict);
    each(attributes, [this](py::handle name, py::handle value) {
      if (PyODict_CheckExact(value.ptr()) && PyDict_Size(value.ptr()) == 0) return;  // as hooks are
      if (atoms_.contains(py::type::handle_of(value)))
        add(value);
      else if (!ignored_.contains(name))
        add(frozen_(value));
    });
    for (const py::object& kind : {names_.parameters, names_.buffers})
      each(attributes[kind], [this](py::handle, py::handle tensor) {
        if (tensor.is_none()) {
          add(tensor);
          add(tensor);
        } else {
          add(tensor.attr(names_.shape));
          add(tensor.attr(names_.dtype));
        }
      });
    each(attributes[names_.modules], [this](py::handle, py::handle child) {
      if (!child.is_none()) visit(child);
    });
  }

 private:
  void add(py::handle value) {
    if (PyList_Append(state.ptr(), value.ptr()) < 0) throw py::error_already_set();
  }

  // Calls body(key, value), which may run Python, for each item of a mapping.
  template <typename Body>
  static void each(const py::object& dict, const Body& body) {
    if (!PyDict_Check(dict.ptr())) {  // as in a scripted module
      for (const py::handle item : dict.attr("items")()) body(item[py::int_(0)], item[py::int_(1)]);
      return;
    }
    const Py_ssize_t size = PyDict_Size(dict.ptr());
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dict.ptr(), &at, &key, &value)) {
      const auto held_key = py::reinterpret_borrow<py::object>(key), held = py::reinterpret_borrow<py::object>(value);
      body(held_key, held);
      if (PyDict_Size(dict.ptr()) != size) throw std::runtime_error("a module's attributes changed while being read");
    }
  }

  const Names& names_ = Names::all();
  const py::frozenset& atoms_;
  const py::frozenset& ignored_;
  const py::function& frozen_;
};

}  // namespace

py::list state_of(py::handle module, const py::frozenset& atoms, const py::frozenset& ignored,
                  const py::function& frozen) {
  Walk walk(atoms, ignored, frozen);
  walk.visit(module);
  return walk.state;
}

}  // namespace wgan_ext
