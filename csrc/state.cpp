#include "state.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

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

// Makes a list.
struct Making {
  static constexpr bool done = false;
  py::list state;

  void add(py::handle value) {
    if (PyList_Append(state.ptr(), value.ptr()) < 0) throw py::error_already_set();
  }
  void add_tensor(py::handle tensor) {
    add(tensor.attr(Names::all().shape));
    add(tensor.attr(Names::all().dtype));
  }
};

// Compares with a list, and is done at the first difference.
struct Comparing {
  const py::list& state;
  bool done = false;
  Py_ssize_t at = 0;

  py::handle next() {
    if (!done && at < PyList_GET_SIZE(state.ptr())) return PyList_GET_ITEM(state.ptr(), at++);
    done = true;
    return {};
  }
  void add(py::handle value) {
    const auto expected = py::reinterpret_borrow<py::object>(next());
    if (done) return;
    const int same = PyObject_RichCompareBool(expected.ptr(), value.ptr(), Py_EQ);
    if (same < 0) throw py::error_already_set();
    done = !same;
  }
  void add_tensor(py::handle tensor) {
    if (!THPVariable_CheckExact(tensor.ptr())) {
      add(tensor.attr(Names::all().shape));
      add(tensor.attr(Names::all().dtype));
      return;
    }
    const py::handle shape = next(), dtype = next();
    if (done) return;
    const at::Tensor& t = THPVariable_Unpack(tensor.ptr());
    done = !PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != t.dim() || !THPDtype_Check(dtype.ptr()) ||
           reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type != t.scalar_type();
    for (int64_t i = 0; !done && i < t.dim(); ++i)
      done = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i)) != t.size(i);
  }
  bool same() const { return !done && at == PyList_GET_SIZE(state.ptr()); }
};

template <typename Sink>
class Walk {
 public:
  Sink sink;

  Walk(Sink sink, const py::frozenset& atoms, const py::frozenset& ignored, const py::function& frozen)
      : sink(std::move(sink)), atoms_(atoms), ignored_(ignored), frozen_(frozen) {}

  void visit(py::handle module) {
    sink.add(py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(module.ptr())));
    sink.add(py::type::handle_of(module));
    const py::object attributes = module.attr(names_.dict);
    each(attributes, [this](py::handle name, py::handle value) {
      if (PyODict_CheckExact(value.ptr()) && PyDict_Size(value.ptr()) == 0) return;  // as hooks are
      if (atoms_.contains(py::type::handle_of(value)))
        sink.add(value);
      else if (!ignored_.contains(name))
        sink.add(frozen_(value));
    });
    for (const py::object& kind : {names_.parameters, names_.buffers})
      each(attributes[kind], [this](py::handle, py::handle tensor) {
        if (tensor.is_none()) {
          sink.add(tensor);
          sink.add(tensor);
        } else {
          sink.add_tensor(tensor);
        }
      });
    each(attributes[names_.modules], [this](py::handle, py::handle child) {
      if (!child.is_none()) visit(child);
    });
  }

 private:
  // Calls body(key, value), which may run Python, for each item of a mapping.
  template <typename Body>
  void each(const py::object& dict, const Body& body) const {
    if (!PyDict_Check(dict.ptr())) {  // as in a scripted module
      for (const py::handle item : dict.attr("items")()) body(item[py::int_(0)], item[py::int_(1)]);
      return;
    }
    const Py_ssize_t size = PyDict_Size(dict.ptr());
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (!sink.done && PyDict_Next(dict.ptr(), &at, &key, &value)) {
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
  Walk walk(Making(), atoms, ignored, frozen);
  walk.visit(module);
  return walk.sink.state;
}

bool same_state(py::handle module, const py::frozenset& atoms, const py::frozenset& ignored, const py::function& frozen,
                const py::list& state, const py::dict& references) {
  PyObject *name = nullptr, *reference = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(references.ptr(), &at, &name, &reference);)
    if (PyWeakref_GetObject(reference) == Py_None) return false;
  Walk walk(Comparing{state}, atoms, ignored, frozen);
  walk.visit(module);
  return walk.sink.same();
}

}  // namespace wgan_ext
