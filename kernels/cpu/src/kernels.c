/* Everything, as one translation unit: one short run of the compiler, and one pool of threads. */
#define _GNU_SOURCE /* for cores.h */
#include "attention.h"
#include "buffers.h"
#include "limits.h"
