// Tensors between the ranks of one host, through memory that all of them have mapped: the extension module.
// The wrapper (shared_memory.py) owns every check; here an address is taken as true. An end is for one thread,
// except `close`.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "shared_group.h"
#include "shared_link.h"

namespace {

using namespace argosy;

constexpr const char* kName = "models.transports.End";

void destroy(PyObject* capsule) { delete static_cast<End*>(PyCapsule_GetPointer(capsule, kName)); }

template <class T>
T* unwrap(PyObject* capsule) {
  auto* end = static_cast<End*>(PyCapsule_GetPointer(capsule, kName));
  auto* wanted = dynamic_cast<T*>(end);
  if (end && !wanted) PyErr_SetString(PyExc_TypeError, "a group is no link, and a link no group");
  return wanted;
}

// Without the interpreter lock; None or the problem.
template <class F>
PyObject* launch(F&& f) {
  std::string problem;
  Py_BEGIN_ALLOW_THREADS;
  problem = f();
  Py_END_ALLOW_THREADS;
  if (problem.empty()) Py_RETURN_NONE;
  return PyUnicode_FromStringAndSize(problem.data(), Py_ssize_t(problem.size()));
}

PyObject* py_open_group(PyObject*, PyObject* args) {
  unsigned long long base;
  long long rank, size, slot_bytes, first_rank;
  double timeout_s;
  if (!PyArg_ParseTuple(args, "KLLLLd", &base, &rank, &size, &slot_bytes, &first_rank, &timeout_s)) return nullptr;
  End* end = new Group(reinterpret_cast<char*>(base), rank, size, size_t(slot_bytes), first_rank, timeout_s);
  return PyCapsule_New(end, kName, destroy);
}

PyObject* py_open_link(PyObject*, PyObject* args) {
  unsigned long long base;
  long long capacity, peer_rank;
  int is_sender;
  double timeout_s;
  if (!PyArg_ParseTuple(args, "KLpLd", &base, &capacity, &is_sender, &peer_rank, &timeout_s)) return nullptr;
  End* end = new Link(reinterpret_cast<char*>(base), size_t(capacity), is_sender != 0, peer_rank, timeout_s);
  return PyCapsule_New(end, kName, destroy);
}

PyObject* py_all_reduce(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x;
  long long bytes;
  if (!PyArg_ParseTuple(args, "OKL", &capsule, &x, &bytes)) return nullptr;
  auto* group = unwrap<Group>(capsule);
  if (!group) return nullptr;
  return launch([&] { return group->all_reduce(reinterpret_cast<char*>(x), size_t(bytes)); });
}

PyObject* py_all_gather(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x, out;
  long long bytes;
  if (!PyArg_ParseTuple(args, "OKLK", &capsule, &x, &bytes, &out)) return nullptr;
  auto* group = unwrap<Group>(capsule);
  if (!group) return nullptr;
  return launch([&] {
    return group->all_gather(reinterpret_cast<const char*>(x), size_t(bytes), reinterpret_cast<char*>(out));
  });
}

PyObject* py_send(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x;
  long long bytes, kind;
  if (!PyArg_ParseTuple(args, "OKLL", &capsule, &x, &bytes, &kind)) return nullptr;
  auto* link = unwrap<Link>(capsule);
  if (!link) return nullptr;
  return launch([&] { return link->send(reinterpret_cast<const char*>(x), uint64_t(bytes), uint64_t(kind)); });
}

PyObject* py_receive(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x;
  long long bytes, kind;
  if (!PyArg_ParseTuple(args, "OKLL", &capsule, &x, &bytes, &kind)) return nullptr;
  auto* link = unwrap<Link>(capsule);
  if (!link) return nullptr;
  return launch([&] { return link->receive(reinterpret_cast<char*>(x), uint64_t(bytes), uint64_t(kind)); });
}

PyObject* py_close(PyObject*, PyObject* capsule) {
  auto* end = unwrap<End>(capsule);
  if (!end) return nullptr;
  end->close();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"open_group", py_open_group, METH_VARARGS, nullptr}, {"open_link", py_open_link, METH_VARARGS, nullptr},
    {"all_reduce", py_all_reduce, METH_VARARGS, nullptr}, {"all_gather", py_all_gather, METH_VARARGS, nullptr},
    {"send", py_send, METH_VARARGS, nullptr},             {"receive", py_receive, METH_VARARGS, nullptr},
    {"close", py_close, METH_O, nullptr},                 {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_shared_memory", "Tensors between the ranks of one host.", -1, methods,
    nullptr,               nullptr,          nullptr,                                  nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__shared_memory() {
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddIntConstant(module, "LINE_BYTES", kLine) != 0) Py_CLEAR(module);
  return module;
}
