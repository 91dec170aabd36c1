// The extension module: unpacks integers (addresses, sizes), releases the interpreter lock, calls a kernel.
// Wrappers in cpu.py own every check; here an address is taken as true.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <string>

#include "cpu_attention.h"
#include "cpu_int4.h"
#include "cpu_int8.h"
#include "cpu_rope.h"

#ifndef ARGOSY_MODULE
#error "setup.py names the module: one per instruction set"
#endif
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace {

using namespace argosy;

// Takes positional arguments in order; remembers the first failure.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}
  int64_t integer() {
    if (next_ >= count_) return missing();
    int64_t value = PyLong_AsLongLong(values_[next_++]);
    if (value == -1 && PyErr_Occurred()) is_ok_ = false;
    return value;
  }
  double real() {
    if (next_ >= count_) return double(missing());
    double value = PyFloat_AsDouble(values_[next_++]);
    if (value == -1.0 && PyErr_Occurred()) is_ok_ = false;
    return value;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(intptr_t(integer()));
  }
  bool is_done() {
    if (is_ok_ && next_ != count_) {
      PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", next_, count_);
      is_ok_ = false;
    }
    return is_ok_;
  }

 private:
  int64_t missing() {
    if (is_ok_) PyErr_Format(PyExc_TypeError, "too few arguments: %zd", count_);
    is_ok_ = false;
    return 0;
  }
  PyObject* const* values_;
  Py_ssize_t count_, next_ = 0;
  bool is_ok_ = true;
};

// Runs `f` without the interpreter lock, alone in the pool.
template <class F>
PyObject* launch(Arguments& arguments, F&& f) {
  if (!arguments.is_done()) return nullptr;
  bool has_memory = true;
  std::string refusal;
  Py_BEGIN_ALLOW_THREADS;
  try {
    std::lock_guard<std::mutex> lock(pool().mutex());
    FloatMode mode;
    f();
  } catch (const std::bad_alloc&) {
    has_memory = false;
  } catch (const std::out_of_range& error) {
    refusal = error.what();
  }
  Py_END_ALLOW_THREADS;
  if (!refusal.empty()) {
    PyErr_SetString(PyExc_ValueError, refusal.c_str());
    return nullptr;
  }
  if (!has_memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* py_set_num_threads(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  int64_t threads = args.integer();
  if (args.is_done() && (threads < 1 || threads > Pool::kMaxThreads))
    return PyErr_Format(PyExc_ValueError, "num_threads must be in 1..%d; got %lld", Pool::kMaxThreads,
                        static_cast<long long>(threads));
  return launch(args, [&] { pool().set_num_threads(int(threads)); });
}

PyObject* py_num_threads(PyObject*, PyObject* const*, Py_ssize_t) { return PyLong_FromLong(pool().num_threads()); }

// Names of the extensions that this machine could run, best first; setup.py says how each is compiled.
PyObject* py_variants(PyObject*, PyObject* const*, Py_ssize_t) {
  const char* names[5];
  Py_ssize_t count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool is_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool is_v4 = is_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl");
  if (is_v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    names[count++] = "_cpu_v4_bf16";
  if (is_v4 && __builtin_cpu_supports("avx512vnni")) names[count++] = "_cpu_v4_vnni";
  if (is_v4) names[count++] = "_cpu_v4";
  if (is_v3) names[count++] = "_cpu_v3";
#endif
  names[count++] = "_cpu_base";
  PyObject* found = PyTuple_New(count);
  for (Py_ssize_t i = 0; found && i < count; i++) {
    PyObject* name = PyUnicode_FromString(names[i]);
    if (!name) {
      Py_CLEAR(found);
      break;
    }
    PyTuple_SET_ITEM(found, i, name);
  }
  return found;
}

// Whether linears with bf16 weights round x to bf16.
PyObject* py_has_dot(PyObject*, PyObject* const*, Py_ssize_t) { return PyBool_FromLong(kHasDot); }

// Asks for huge pages under memory that is about to be filled: 4 KiB pages cost a TLB miss per block of keys.
PyObject* py_advise_huge(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  uintptr_t start = uintptr_t(args.integer()), end = start + uintptr_t(args.integer());
  if (!args.is_done()) return nullptr;
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20, kPage = 4096;
  start = (start + kPage - 1) / kPage * kPage, end = end / kPage * kPage;
  if (end >= start + kHuge) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
  Py_RETURN_NONE;
}

PyObject* py_pack(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* weight = args.pointer<const void>();
  auto* out = args.pointer<void>();
  int format = int(args.integer());
  int64_t n = args.integer(), k = args.integer();
  return launch(args, [&] { pack_weight(weight, out, format, n, k); });
}

PyObject* py_linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  Linear a;
  a.x = args.pointer<const float>();
  a.weight = args.pointer<const char>();
  a.format = int(args.integer());
  a.bias = args.pointer<const void>();
  a.bias_format = int(args.integer());
  a.out = args.pointer<float>();
  a.is_residual = args.integer() != 0;
  a.m = args.integer(), a.n = args.integer(), a.k = args.integer();
  return launch(args, [&] { linear(a); });
}

PyObject* py_pack_int8(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* codes = args.pointer<const int8_t>();
  auto* out = args.pointer<uint8_t>();
  int64_t n = args.integer(), k = args.integer();
  return launch(args, [&] { pack_int8(codes, out, n, k); });
}

PyObject* py_pack_int4(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* codes = args.pointer<const uint8_t>();
  auto* scales = args.pointer<const uint16_t>();
  auto* offsets = args.pointer<const uint16_t>();
  auto* out = args.pointer<char>();
  int64_t n = args.integer(), k = args.integer();
  return launch(args, [&] { pack_int4(codes, scales, offsets, out, n, k); });
}

// kind: 0 = int8, 1 = int4 symmetric around 8, 2 = int4 with offsets. scales: of int8 only.
PyObject* py_linear_codes(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  Linear a;
  a.x = args.pointer<const float>();
  a.weight = args.pointer<const char>();
  int64_t kind = args.integer();
  auto* scales = args.pointer<const float>();
  a.bias = args.pointer<const void>();
  a.bias_format = int(args.integer());
  a.out = args.pointer<float>();
  a.is_residual = args.integer() != 0;
  a.m = args.integer(), a.n = args.integer(), a.k = args.integer();
  return launch(args, [&] {
    if (kind == 0) return linear_by_codes<Int8>(a, scales);
    if (kind == 1) return linear_by_codes<Int4<false>>(a, nullptr);
    linear_by_codes<Int4<true>>(a, nullptr);
  });
}

PyObject* py_rms_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* x = args.pointer<const float>();
  auto* weight = args.pointer<const void>();
  int format = int(args.integer());
  auto* out = args.pointer<float>();
  int64_t rows = args.integer(), n = args.integer();
  float eps = float(args.real());
  return launch(args, [&] { rms_norm(x, weight, format, out, rows, n, eps); });
}

PyObject* py_layer_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  LayerNorm a;
  a.x = args.pointer<const float>();
  a.weight = args.pointer<const void>();
  a.weight_format = int(args.integer());
  a.bias = args.pointer<const void>();
  a.bias_format = int(args.integer());
  a.out = args.pointer<float>();
  a.rows = args.integer(), a.n = args.integer();
  a.eps = float(args.real());
  return launch(args, [&] { layer_norm(a); });
}

PyObject* py_gate_mul(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* gate_up = args.pointer<const float>();
  auto* out = args.pointer<float>();
  int64_t rows = args.integer(), n = args.integer();
  int activation = int(args.integer());
  return launch(args, [&] { gate_mul(gate_up, out, rows, n, activation); });
}

PyObject* py_activate(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* x = args.pointer<const float>();
  auto* out = args.pointer<float>();
  int64_t size = args.integer();
  int activation = int(args.integer());
  return launch(args, [&] { activate(x, out, size, activation); });
}

PyObject* py_soft_cap(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* x = args.pointer<float>();
  int64_t size = args.integer();
  float cap = float(args.real());
  return launch(args, [&] { soft_cap(x, size, cap); });
}

PyObject* py_gather_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  auto* table = args.pointer<const void>();
  int format = int(args.integer());
  auto* ids = args.pointer<const int32_t>();
  auto* out = args.pointer<float>();
  int64_t rows = args.integer(), n = args.integer(), table_rows = args.integer();
  return launch(args, [&] {
    check_range("token id", ids, rows, table_rows);
    gather_rows(table, format, ids, out, rows, n);
  });
}

PyObject* py_rope_store(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  RopeStore a;
  a.qkv = args.pointer<const float>();
  a.positions = args.pointer<const int32_t>();
  a.slots = args.pointer<const int32_t>();
  a.cos_sin = args.pointer<const float>();
  a.half = args.integer(), a.max_positions = args.integer();
  a.key = args.pointer<char>();
  a.value = args.pointer<char>();
  a.format = int(args.integer());
  a.block = args.integer(), a.num_blocks = args.integer(), a.tokens = args.integer();
  a.heads = int(args.integer()), a.kv_heads = int(args.integer()), a.size = int(args.integer());
  a.q = args.pointer<float>();
  a.q_norm = args.pointer<const void>();
  a.q_norm_format = int(args.integer());
  a.k_norm = args.pointer<const void>();
  a.k_norm_format = int(args.integer());
  a.eps = float(args.real());
  return launch(args, [&] { rope_store(a); });
}

PyObject* py_attention(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  Attention a;
  a.q = args.pointer<const float>();
  a.key = args.pointer<const char>();
  a.value = args.pointer<const char>();
  a.format = int(args.integer());
  a.starts = args.pointer<const int32_t>();
  a.lengths = args.pointer<const int32_t>();
  a.table = args.pointer<const int32_t>();
  a.rows = args.integer(), a.table_width = args.integer(), a.tokens = args.integer();
  a.heads = int(args.integer()), a.kv_heads = int(args.integer()), a.size = int(args.integer());
  a.block = args.integer(), a.num_blocks = args.integer();
  a.scale = float(args.real());
  a.window = args.integer();
  a.softcap = float(args.real());
  a.out = args.pointer<float>();
  a.lse = args.pointer<float>();
  return launch(args, [&] { attention(a); });
}

#define METHOD(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_##name)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    METHOD(set_num_threads), METHOD(num_threads), METHOD(pack),       METHOD(linear),      METHOD(rms_norm),
    METHOD(layer_norm),      METHOD(gate_mul),    METHOD(activate),   METHOD(soft_cap),    METHOD(gather_rows),
    METHOD(rope_store),      METHOD(attention),   METHOD(variants),   METHOD(advise_huge), METHOD(has_dot),
    METHOD(pack_int8),       METHOD(pack_int4),   METHOD(linear_codes),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, TEXT(ARGOSY_MODULE), "CPU kernels of one instruction set.", -1, methods,
    nullptr,               nullptr,             nullptr,                               nullptr,
};

}  // namespace

PyMODINIT_FUNC JOIN(PyInit_, ARGOSY_MODULE)() {
  if (!pool_slot()) create_pool();
  return PyModule_Create(&definition);
}
