/* The CPU kernel as an operation of MLX's lazy graph.

   Python's arrays become inputs of a primitive, and one array that Python has just made becomes its output. MLX runs
   the primitive when somebody asks for its output, on the thread of its CPU stream, as it runs operations of its own.

   MLX's headers are those of the wheel. Of CPython, only its stable ABI is used, and declared here: its headers may not
   be installed. Where an array lies within the Python object around it is nanobind's business (nb_inst in its
   nb_internals.h), whose headers no wheel has: see array_in. Before any of this runs in a user's process, it has run in
   one of its own (graph_probe.py). */
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"
#include "mlx/version.h"

extern "C" {
struct PyObject;
struct PyMethodDef {
  const char *name;
  PyObject *(*function)(PyObject *self, PyObject *const *arguments, intptr_t count);
  int flags;
  const char *doc;
};
constexpr int METH_FASTCALL = 0x80;
PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *self, PyObject *module);
PyObject *PyLong_FromLong(long);
long PyLong_AsLong(PyObject *);
void *PyLong_AsVoidPtr(PyObject *);
double PyFloat_AsDouble(PyObject *);
int PyBytes_AsStringAndSize(PyObject *, char **data, intptr_t *size);
PyObject *PyErr_Occurred(void);
void PyErr_SetString(PyObject *type, const char *message);
extern PyObject *PyExc_RuntimeError;
extern PyObject _Py_NoneStruct;
}

namespace {

namespace mx = mlx::core;

using kernel = int (*)(const void *call, double scale); /* qsdpa_attend */

/* As in unpack.h: where an array starts, and strides in bytes, 0 along axes of size 1. */
struct view {
  const uint8_t *data;
  int64_t strides[4];
};

/* The views of the C structure `call`, which come first in it. */
enum { OUTPUT = 1, MASK = 2, SINKS = 3, KEYS = 6, VALUES = 9, VIEWS = 12 };
enum { CODES, SCALES, BIASES }; /* of keys, and of values */

view view_of(const mx::array &a) {
  view v = {a.data<uint8_t>(), {}};
  for (int i = 0; i < static_cast<int>(a.ndim()); i++) {
    v.strides[i] = a.shape(i) == 1 ? 0 : a.strides(i) * static_cast<int64_t>(a.itemsize());
  }
  return v;
}

/* The kernel reads masks and sinks with their strides, and whole rows of anything else. */
bool can_be_read(int place, const mx::array &a) {
  return place == MASK || place == SINKS || a.shape(-1) == 1 || a.strides(-1) == 1;
}

view heads_of(const view &v, int first, int heads) {
  view part = v;
  part.data += first * v.strides[1];
  if (heads == 1) part.strides[1] = 0;
  return part;
}

/* The parts of keys and values of `heads` heads each, where those of the keys are a PackedStack of both. */
void part_stack(view *views, int heads, bool has_biases) {
  const view codes = views[KEYS + CODES], scales = views[KEYS + SCALES];
  for (int i = 0; i < 2; i++) {
    view *parts = views + (i ? VALUES : KEYS);
    parts[CODES] = heads_of(codes, i * heads, heads);
    parts[SCALES] = heads_of(scales, i * heads, heads);
    if (has_biases) parts[BIASES] = heads_of(scales, (2 + i) * heads, heads);
  }
}

void gather(const view &from, const mx::Shape &shape, size_t itemsize, uint8_t *to) {
  for (int64_t i = 0; i < shape[0]; i++)
    for (int64_t j = 0; j < shape[1]; j++)
      for (int64_t k = 0; k < shape[2]; k++)
        for (int64_t l = 0; l < shape[3]; l++, to += itemsize) {
          const int64_t at = i * from.strides[0] + j * from.strides[1] + k * from.strides[2] + l * from.strides[3];
          std::memcpy(to, from.data + at, itemsize);
        }
}

class QuantizedAttention : public mx::Primitive {
 public:
  /* fields: the structure `call`, its views left out. places: of the inputs among the views. stacked: heads of the keys
     where their codes and scales are those of a stack, of keys and values; else 0. */
  QuantizedAttention(mx::Stream stream, kernel attend, std::vector<int64_t> fields, double scale,
                     std::vector<int> places, int stacked)
      : Primitive(stream),
        attend_(attend),
        fields_(std::move(fields)),
        scale_(scale),
        places_(std::move(places)),
        stacked_(stacked) {}

  /* Called by who evaluates; only what is dispatched runs on the stream's thread, where inputs have their numbers. MLX
     keeps the buffers of inputs, outputs and temporaries until then. */
  void eval_cpu(const std::vector<mx::array> &inputs, std::vector<mx::array> &outputs) override {
    auto &encoder = mx::cpu::get_command_encoder(stream());
    auto call = fields_;
    auto *views = reinterpret_cast<view *>(call.data());
    bool has_biases = false;
    for (size_t i = 0; i < inputs.size(); i++) {
      if (places_[i] == KEYS + SCALES) has_biases = inputs[i].shape(1) == 4 * stacked_;
      views[places_[i]] = can_be_read(places_[i], inputs[i]) ? view_of(inputs[i]) : view_of_copy(inputs[i], encoder);
    }
    if (stacked_) part_stack(views, stacked_, has_biases);
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    views[OUTPUT] = view_of(outputs[0]);
    encoder.dispatch([call = std::move(call), scale = scale_, attend = attend_] {
      if (attend(call.data(), scale)) throw std::runtime_error("not enough memory for quantized attention on the CPU");
    });
  }

  void eval_gpu(const std::vector<mx::array> &, std::vector<mx::array> &) override {
    throw std::runtime_error("quantized attention of the CPU kernel was put on a GPU's stream");
  }

  const char *name() const override { return "QuantizedAttention"; }

 private:
  static view view_of_copy(const mx::array &a, mx::cpu::CommandEncoder &encoder) {
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(copy.nbytes()));
    encoder.add_temporary(copy);
    encoder.dispatch([from = view_of(a), shape = a.shape(), itemsize = a.itemsize(), to = copy.data<uint8_t>()] {
      gather(from, shape, itemsize, to);
    });
    return view_of(copy);
  }

  kernel attend_;
  std::vector<int64_t> fields_;
  double scale_;
  std::vector<int> places_;
  int stacked_;
};

/* nanobind's object: Python's header (16 bytes, but in free-threaded builds), the array's distance from the object's
   start, and flags: whether it is constructed, whether it lies there or is pointed to, and who destroys it. */
struct instance {
  void *header[2];
  int32_t distance;
  uint32_t flags;
};

/* The array in a Python object that has it at the same distance, and under the same flags, as `example`; else NULL. */
mx::array *array_in(PyObject *object, PyObject *example) {
  const auto *it = reinterpret_cast<instance *>(object), *same = reinterpret_cast<instance *>(example);
  if (it->distance != same->distance || it->flags != same->flags) return nullptr;
  return reinterpret_cast<mx::array *>(reinterpret_cast<char *>(object) + it->distance);
}

enum { BUILT, TRACED, OTHER_OBJECT };

int build(kernel attend, const char *fields, size_t size, double scale, int value_dim, int stacked,
          PyObject *const *objects) {
  std::vector<mx::array> inputs;
  std::vector<int> places;
  inputs.reserve(VIEWS);
  places.reserve(VIEWS);
  for (int i = 0; i < VIEWS; i++) {
    if (i == OUTPUT || objects[i] == &_Py_NoneStruct) continue;
    const mx::array *a = array_in(objects[i], objects[OUTPUT]);
    if (!a) return OTHER_OBJECT;
    if (a->is_tracer()) return TRACED;
    inputs.push_back(*a);
    places.push_back(i);
  }
  std::vector<int64_t> call(size / sizeof(int64_t));
  std::memcpy(call.data(), fields, call.size() * sizeof(int64_t));
  const mx::array &queries = inputs[0];
  mx::Shape shape = {queries.shape(0), queries.shape(1), queries.shape(2), value_dim};
  const auto dtype = queries.dtype();
  auto primitive = std::make_shared<QuantizedAttention>(mx::default_stream(mx::Device::cpu), attend, std::move(call),
                                                        scale, std::move(places), stacked);
  mx::array *out = array_in(objects[OUTPUT], objects[OUTPUT]);
  *out = mx::array(std::move(shape), dtype, std::move(primitive), std::move(inputs));
  return BUILT;
}

/* (address of qsdpa_attend, fields, scale, value_dim, stacked, the 12 arrays of `call` or None) -> BUILT or why not. */
PyObject *attend(PyObject *, PyObject *const *arguments, intptr_t count) {
  char *fields;
  intptr_t size;
  if (count != 5 + VIEWS) {
    PyErr_SetString(PyExc_RuntimeError, "wrong number of arguments");
    return nullptr;
  }
  const auto attend = reinterpret_cast<kernel>(PyLong_AsVoidPtr(arguments[0]));
  if (PyBytes_AsStringAndSize(arguments[1], &fields, &size)) return nullptr;
  const double scale = PyFloat_AsDouble(arguments[2]);
  const int value_dim = static_cast<int>(PyLong_AsLong(arguments[3]));
  const int stacked = static_cast<int>(PyLong_AsLong(arguments[4]));
  if (PyErr_Occurred()) return nullptr;
  try {
    return PyLong_FromLong(build(attend, fields, static_cast<size_t>(size), scale, value_dim, stacked, arguments + 5));
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef method = {"attend", attend, METH_FASTCALL, nullptr};

}  // namespace

/* Which copy of MLX this is linked with: it has to be the one that Python uses. */
extern "C" const void *qsdpa_graph_mlx(void) { return reinterpret_cast<const void *>(&mx::version); }

extern "C" PyObject *qsdpa_graph_attend(void) { return PyCFunction_NewEx(&method, nullptr, nullptr); }
