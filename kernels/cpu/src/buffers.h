/* Where the numbers of Python's arrays lie, by the buffer protocol, for many arrays in one call. */
#ifndef QSDPA_BUFFERS_H
#define QSDPA_BUFFERS_H

#include <stddef.h>

#include "unpack.h"

/* CPython's Py_buffer: part of its stable ABI since 3.11. */
typedef struct {
  void *buf, *obj;
  ptrdiff_t len, itemsize;
  int readonly, ndim;
  char *format;
  ptrdiff_t *shape, *strides, *suboffsets;
  void *internal;
} py_buffer;

enum { STRIDES = 0x10 | 0x8 }; /* PyBUF_STRIDES */

/* Views of `count` objects; NULL stands for one that is not there. Called with the interpreter's lock, with
   PyObject_GetBuffer and PyBuffer_Release. Returns -1, or the index of the first object that has no view: Python's
   error is set, or it has more than four axes. */
__attribute__((visibility("default"))) long qsdpa_views(void *const *objects, long count, view *views,
                                                        int (*get)(void *, py_buffer *, int),
                                                        void (*release)(py_buffer *)) {
  for (long i = 0; i < count; i++) {
    int64_t strides[4] = {0};
    views[i] = (view){0};
    if (!objects[i]) continue;
    py_buffer b;
    if (get(objects[i], &b, STRIDES)) return i;
    const int ndim = b.ndim, taken = ndim <= 4;
    for (int k = 0; taken && k < ndim; k++) strides[k] = b.shape[k] == 1 ? 0 : b.strides[k];
    views[i] = (view){b.buf, strides[0], strides[1], strides[2], strides[3]};
    release(&b);
    if (!taken) return i;
  }
  return -1;
}

#endif
