// Run-time half of the Metal emulator: executes one compiled kernel over a grid, lane by lane.
//
// Every thread of a threadgroup is a fiber with its own stack. A fiber runs until it reaches a barrier or a SIMD-group
// function, and then waits: the scheduler lets a SIMD-group go on when all of its lanes have arrived at the same
// function, and a threadgroup when all of its threads have arrived at the same barrier. Anything else is an error, as it
// is undefined on a GPU. Threadgroups run one after another.
//
// Kernels compiled with -fsanitize-coverage=trace-loads,trace-stores report every access here, where it is checked
// (bounds, initialisation, races) and counted. The file is plain C++17 for x86-64, and is never instrumented itself.
#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

// ---- the interface with Python (ctypes structures of the same names in worker.py) ---------------------------------

enum Flags { CHECK_RACES = 1, SHUFFLE_ORDER = 2 };

struct ThreadIds {  // the layout of `emu_ids` in metal.h
  u32 position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3], threads_per_threadgroup[3],
      dispatch_threads_per_threadgroup[3], threadgroups_per_grid[3], threads_per_grid[3];
  u32 lane, simdgroup, index_in_threadgroup, simdgroups;
};

enum Access { READ_ONLY = 0, WRITABLE = 1, ATOMIC = 3 };

struct Buffer {
  u8* base;
  const u8* inside;  // for a strided view: nonzero for the bytes that belong to it; or null
  u64 size;
  int access;
  int initialised;
};

enum Op { SUM, MAX, MIN, PRODUCT, SHUFFLE, SHUFFLE_XOR, SHUFFLE_DOWN, SHUFFLE_UP, BROADCAST, BALLOT, MATRIX, N_OPS };

struct GridStats {  // over the whole grid; SIMD-group functions are counted once per SIMD-group
  u64 threads, threadgroups, simdgroups, threadgroup_barriers, simdgroup_barriers, threadgroup_memory_bytes,
      threadgroup_loads, threadgroup_stores;
  u64 ops[N_OPS];
  char error[512];
};

// Threadgroups in a row that run at the same time on any GPU, since it has as many cores, and share its cache.
constexpr u32 SIDE_BY_SIDE = 4;

struct BufferStats {  // unique: each byte counted once per grid, once per SIDE_BY_SIDE threadgroups, or once per one
  u64 loads, load_bytes, unique_bytes, neighbour_unique_bytes, threadgroup_unique_bytes, stores, store_bytes,
      unique_stored_bytes;
};

// ---- fibers ---------------------------------------------------------------------------------------------------------

extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rdx
  jmp *%rdx
)");

enum State : u8 { RUNNING, AT_SIMD_OP, AT_BARRIER, DONE };
constexpr u32 SIMD_BARRIER = 101, TG_BARRIER = 100;
constexpr size_t STACK = 128 << 10;
constexpr u32 MAX_THREADS = 1024;

struct Fiber {
  void* stack_pointer;
  State state;
  u32 op, line;  // what it waits at, and where in the source
  ThreadIds ids;
};

struct alignas(16) Slot {
  u8 bytes[64];
};

struct SimdGroup {
  u32 first, size;
  u32 epoch;         // SIMD-group functions and barriers passed; slots alternate between two epochs
  u32 memory_epoch;  // barriers passed: what orders accesses of its lanes to threadgroup memory
  u32 active[2];
  Slot in[2][32], out[2][32];
};

static u8* stacks;
static std::vector<Fiber> fibers;
static std::vector<SimdGroup> simdgroups;
static Fiber* current;
static void* scheduler_stack;
static void (*kernel)(const u64*, const ThreadIds*);
static const u64* kernel_arguments;
static GridStats* stats;
static void* bail_out[5];
static int flags;
static u32 barrier_epoch;   // threadgroup barriers passed, in this threadgroup
static u64 threadgroup_id;  // serial number of the threadgroup that runs

[[noreturn]] static void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(stats->error, sizeof stats->error, format, arguments);
  va_end(arguments);
  if (current) {
    size_t n = strlen(stats->error);
    const ThreadIds& i = current->ids;
    snprintf(stats->error + n, sizeof stats->error - n,
             " [threadgroup (%u,%u,%u) thread (%u,%u,%u) simdgroup %u lane %u]", i.threadgroup_position[0],
             i.threadgroup_position[1], i.threadgroup_position[2], i.position_in_threadgroup[0],
             i.position_in_threadgroup[1], i.position_in_threadgroup[2], i.simdgroup, i.lane);
  }
  __builtin_longjmp(bail_out, 1);
}

static void fiber_main() {
  kernel(kernel_arguments, &current->ids);
  current->state = DONE;
  void* discarded;
  emu_switch(&discarded, scheduler_stack);
  __builtin_trap();
}

static inline void wait_at(State state, u32 op, u32 line) {
  Fiber* me = current;
  me->state = state;
  me->op = op;
  me->line = line;
  emu_switch(&me->stack_pointer, scheduler_stack);
}

// ---- threadgroup memory ---------------------------------------------------------------------------------------------

constexpr u64 ARENA = 256 << 10, RED_ZONE = 64, THREADGROUP_MEMORY_LIMIT = 32768;

struct Variable {
  u64 offset, size;
};

// Who last loaded and stored a byte: thread (plus 1), SIMD-group, and the epochs of both kinds of barrier then.
struct Shadow {
  u32 store_thread, store_epoch, store_simdgroup, store_simd_epoch;
  u32 load_thread, load_epoch, load_simdgroup, load_simd_epoch;
  bool initialised;
};

static u8* arena;
static u64 arena_used;
static std::map<u32, Variable> variables;
static std::vector<Shadow> shadow;

// Whether an access by another thread may run at the same time as one by the current thread.
static inline bool concurrent(u32 thread, u32 epoch, u32 simdgroup, u32 simd_epoch) {
  if (!thread || thread == current->ids.index_in_threadgroup + 1 || epoch != barrier_epoch) return false;
  u32 mine = current->ids.simdgroup;
  return !(simdgroup == mine && simd_epoch != simdgroups[mine].memory_epoch);
}

template <bool STORE>
static void check_race(u64 offset) {
  const char* what = STORE ? "store" : "load";
  u32 thread = current->ids.index_in_threadgroup + 1, simdgroup = current->ids.simdgroup;
  u32 simd_epoch = simdgroups[simdgroup].memory_epoch;
  Shadow& s = shadow[offset];
  if (concurrent(s.store_thread, s.store_epoch, s.store_simdgroup, s.store_simd_epoch))
    fail("threadgroup-memory race: %s after store by thread %u without a barrier (offset %lu)", what,
         s.store_thread - 1, offset);
  if (STORE) {
    if (concurrent(s.load_thread, s.load_epoch, s.load_simdgroup, s.load_simd_epoch))
      fail("threadgroup-memory race: store after load by thread %u without a barrier (offset %lu)", s.load_thread - 1,
           offset);
    s.store_thread = thread;
    s.store_epoch = barrier_epoch;
    s.store_simdgroup = simdgroup;
    s.store_simd_epoch = simd_epoch;
    s.initialised = true;
    return;
  }
  if (!s.initialised) fail("load of uninitialised threadgroup memory (offset %lu)", offset);
  // A load by another SIMD-group of this epoch stays recorded: only a barrier ends it.
  bool keep = s.load_epoch == barrier_epoch && s.load_thread && s.load_thread != thread && s.load_simdgroup != simdgroup;
  if (!keep) {
    s.load_thread = thread;
    s.load_epoch = barrier_epoch;
    s.load_simdgroup = simdgroup;
    s.load_simd_epoch = simd_epoch;
  }
}

template <bool STORE>
static void touch_threadgroup(u8* p, u32 n) {
  (STORE ? stats->threadgroup_stores : stats->threadgroup_loads)++;
  u64 offset = p - arena;
  bool inside = std::any_of(variables.begin(), variables.end(), [&](const auto& v) {
    return offset >= v.second.offset && offset + n <= v.second.offset + v.second.size;
  });
  if (!inside) fail("out-of-bounds threadgroup-memory %s of %u bytes", STORE ? "store" : "load", n);
  if (flags & CHECK_RACES)
    for (u32 i = 0; i < n; i++) check_race<STORE>(offset + i);
}

// ---- device and constant memory -------------------------------------------------------------------------------------

struct TracedBuffer {
  Buffer buffer;
  BufferStats* stats;
  std::vector<u32> loaded_by, stored_by;  // threadgroup (plus 1) that last did, by byte
};

static std::vector<TracedBuffer> buffers;
static u8 *device_begin, *device_end;

template <bool STORE>
static void touch_device(u8* p, u32 n) {
  u32 me = u32(threadgroup_id) + 1;
  for (size_t index = 0; index < buffers.size(); index++) {
    TracedBuffer& b = buffers[index];
    if (p < b.buffer.base || p + n > b.buffer.base + b.buffer.size) continue;
    u64 offset = p - b.buffer.base;
    if (STORE) {
      if (!(b.buffer.access & WRITABLE)) fail("store to read-only buffer #%zu byte %lu", index, offset);
      b.stats->stores++;
      b.stats->store_bytes += n;
      for (u64 i = offset; i < offset + n; i++) {
        if (!b.stored_by[i])
          b.stats->unique_stored_bytes++;
        else if ((flags & CHECK_RACES) && b.stored_by[i] != me && b.buffer.access != ATOMIC)
          fail("buffer #%zu byte %lu stored by two threadgroups", index, i);
        b.stored_by[i] = me;
      }
    } else {
      b.stats->loads++;
      b.stats->load_bytes += n;
      for (u64 i = offset; i < offset + n; i++) {
        if (b.buffer.inside && !b.buffer.inside[i]) fail("load of buffer #%zu byte %lu, outside of the slice", index, i);
        if (!b.buffer.initialised && !b.stored_by[i]) fail("load of uninitialised output buffer #%zu byte %lu", index, i);
        if (!b.loaded_by[i]) b.stats->unique_bytes++;
        if (b.loaded_by[i] != me) b.stats->threadgroup_unique_bytes++;
        if (!b.loaded_by[i] || me - b.loaded_by[i] >= SIDE_BY_SIDE) b.stats->neighbour_unique_bytes++;
        b.loaded_by[i] = me;
      }
    }
    return;
  }
  fail("out-of-bounds device %s of %u bytes", STORE ? "store" : "load", n);
}

template <bool STORE>
static void touch(u8* p, u32 n) {
  if (!current) return;
  if (p >= device_begin && p < device_end) return touch_device<STORE>(p, n);
  if (p >= arena && p < arena + ARENA) return touch_threadgroup<STORE>(p, n);
  u8* own = stacks + size_t(current - fibers.data()) * STACK;
  bool foreign = p >= stacks && p < stacks + MAX_THREADS * STACK && !(p >= own && p < own + STACK);
  if (foreign) fail("access to another thread's private memory");
}

// ---- what compiled kernels call -------------------------------------------------------------------------------------

extern "C" {
#define EMU_TRACE(n)                                                   \
  void __sanitizer_cov_load##n(u8* p) { touch<false>(p, n); }          \
  void __sanitizer_cov_store##n(u8* p) { touch<true>(p, n); }
EMU_TRACE(1)
EMU_TRACE(2)
EMU_TRACE(4)
EMU_TRACE(8)
EMU_TRACE(16)

void* emu_threadgroup_variable(u32 id, u64 size) {
  auto found = variables.find(id);
  if (found == variables.end()) {
    u64 offset = (arena_used + RED_ZONE + 15) & ~15ull;
    if (offset + size + RED_ZONE > ARENA) fail("threadgroup memory too large");
    found = variables.emplace(id, Variable{offset, size}).first;
    arena_used = offset + size;
    u64 total = 0;
    for (const auto& v : variables) total += (v.second.size + 15) & ~15ull;
    stats->threadgroup_memory_bytes = std::max(stats->threadgroup_memory_bytes, total);
    if (total > THREADGROUP_MEMORY_LIMIT)
      fail("threadgroup memory %lu bytes exceeds the %lu-byte limit", total, THREADGROUP_MEMORY_LIMIT);
  }
  return arena + found->second.offset;
}

u32 emu_lane() { return current->ids.lane; }
void emu_threadgroup_barrier(u32 line) { wait_at(AT_BARRIER, TG_BARRIER, line); }
void emu_simdgroup_barrier(u32 line) { wait_at(AT_SIMD_OP, SIMD_BARRIER, line); }

// Every lane deposits up to 64 bytes and then sees all lanes' values, and the mask of those that take part.
const void* emu_simd_gather(u32 op, u32 line, const void* value, u32 size, u32* active) {
  SimdGroup& g = simdgroups[current->ids.simdgroup];
  u32 e = g.epoch & 1;
  memcpy(g.in[e][current->ids.lane].bytes, value, size);
  wait_at(AT_SIMD_OP, op, line);
  *active = g.active[e];
  return g.in[e];
}

// As emu_simd_gather, but the scheduler computes the result (a float sum, extremum or product; an 8x8 matrix product)
// once for the SIMD-group: returns this lane's.
const void* emu_simd_compute(u32 op, u32 line, const void* value, u32 size) {
  SimdGroup& g = simdgroups[current->ids.simdgroup];
  u32 e = g.epoch & 1, lane = current->ids.lane;
  memcpy(g.in[e][lane].bytes, value, size);
  wait_at(AT_SIMD_OP, op | 64, line);
  return g.out[e][lane].bytes;
}
}  // extern "C"

// ---- instruction counts: how often each basic block ran (instructions.py) ------------------------------------------------

constexpr u32 MAX_BLOCKS = 1 << 16;
static u64 block_counts[MAX_BLOCKS];
extern "C" void emu_count(u32 block) { block_counts[block & (MAX_BLOCKS - 1)]++; }
extern "C" const u64* emu_block_counts() { return block_counts; }

// ---- the scheduler --------------------------------------------------------------------------------------------------

static float combine(u32 op, float x, float y) {
  switch (op) {
    case SUM: return x + y;
    case MAX: return __builtin_fmaxf(x, y);
    case MIN: return __builtin_fminf(x, y);
    default: return x * y;
  }
}

static void compute_reduction(SimdGroup& g, u32 e, u32 op, u32 active) {
  const float identity[] = {0.f, -__builtin_inff(), __builtin_inff(), 1.f};
  float t[32];
  for (u32 i = 0; i < 32; i++)
    if (active >> i & 1) memcpy(&t[i], g.in[e][i].bytes, 4);
    else t[i] = identity[op];
  for (u32 n = 16; n; n >>= 1)
    for (u32 i = 0; i < n; i++) t[i] = combine(op, t[i], t[i + n]);
  for (u32 i = 0; i < 32; i++) memcpy(g.out[e][i].bytes, &t[0], 4);
}

// D = A B + C. A lane holds two neighbours of a row of each matrix, placed as in MLX's steel/attn/mma.h (get_coord).
static void compute_matrix_product(SimdGroup& g, u32 e) {
  float m[3][8][8];
  for (u32 lane = 0; lane < 32; lane++) {
    u32 quad = lane / 4, row = (quad & 4) + (lane / 2) % 4, column = (quad & 2) * 2 + (lane % 2) * 2;
    float v[6];
    memcpy(v, g.in[e][lane].bytes, sizeof v);
    for (u32 k = 0; k < 6; k++) m[k / 2][row][column + k % 2] = v[k];
  }
  for (u32 lane = 0; lane < 32; lane++) {
    u32 quad = lane / 4, row = (quad & 4) + (lane / 2) % 4, column = (quad & 2) * 2 + (lane % 2) * 2;
    float v[2];
    for (u32 i = 0; i < 2; i++) {
      v[i] = m[2][row][column + i];
      for (u32 k = 0; k < 8; k++) v[i] += m[0][row][k] * m[1][k][column + i];
    }
    memcpy(g.out[e][lane].bytes, v, sizeof v);
  }
}

// Let a SIMD-group go on whose lanes all wait or are done.
static void resolve(SimdGroup& g) {
  u32 active = 0;
  Fiber* first = nullptr;
  for (u32 i = 0; i < g.size; i++) {
    Fiber& f = fibers[g.first + i];
    if (f.state != AT_SIMD_OP) continue;
    if (!first) first = &f;
    if (first->op != f.op || first->line != f.line) {
      current = &f;
      fail("divergent SIMD-group operation: lane %u is at line %u (op %u), lane %u at line %u (op %u)",
           first->ids.lane, first->line, first->op & 63, f.ids.lane, f.line, f.op & 63);
    }
    active |= 1u << i;
  }
  if (!first) return;
  u32 full = g.size == 32 ? ~0u : (1u << g.size) - 1;
  if (active != full) {
    current = first;
    fail("SIMD-group operation at line %u reached by lanes %08x only", first->line, active);
  }
  u32 e = g.epoch & 1, op = first->op == SIMD_BARRIER ? SIMD_BARRIER : first->op & 63;
  g.active[e] = active;
  if (op == SIMD_BARRIER) {
    stats->simdgroup_barriers++;
    g.memory_epoch++;
  } else {
    stats->ops[op]++;
  }
  if (op != SIMD_BARRIER && first->op & 64) {
    if (op == MATRIX) compute_matrix_product(g, e);
    else compute_reduction(g, e, op, active);
  }
  g.epoch++;
  for (u32 i = 0; i < g.size; i++) fibers[g.first + i].state = RUNNING;
}

static u32 random_number() {
  static u64 state = 88172645463325252ull;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return u32(state >> 11);
}

static void run_simdgroup(SimdGroup& g) {
  for (;;) {
    bool ran = false;
    u32 start = flags & SHUFFLE_ORDER ? random_number() : 0;
    for (u32 i = 0; i < g.size; i++) {
      Fiber& f = fibers[g.first + (i + start) % g.size];
      if (f.state != RUNNING) continue;
      current = &f;
      emu_switch(&scheduler_stack, f.stack_pointer);
      ran = true;
    }
    current = nullptr;
    if (!ran) return;
    resolve(g);
  }
}

// Let a threadgroup pass the barrier that its threads wait at. False: all are done.
static bool pass_barrier() {
  u32 waiting = 0;
  Fiber* first = nullptr;
  for (Fiber& f : fibers) {
    if (f.state != AT_BARRIER) continue;
    waiting++;
    if (!first) first = &f;
    if (first->line != f.line) {
      current = &f;
      fail("threads wait at different barriers: lines %u and %u", first->line, f.line);
    }
  }
  if (!waiting) return false;
  if (waiting != fibers.size()) {
    current = first;
    fail("threadgroup_barrier at line %u reached by %u of %zu threads", first->line, waiting, fibers.size());
  }
  stats->threadgroup_barriers++;
  barrier_epoch++;
  for (Fiber& f : fibers) f.state = RUNNING;
  for (SimdGroup& g : simdgroups) g.epoch += 2;
  return true;
}

static void start_fiber(u32 i) {
  void** sp = (void**)(stacks + size_t(i + 1) * STACK) - 2;
  *sp = (void*)fiber_main;
  sp -= 6;
  memset(sp, 0, 48);
  fibers[i].stack_pointer = sp;
  fibers[i].state = RUNNING;
}

static void run_threadgroup() {
  u32 count = u32(fibers.size()), groups = (count + 31) / 32;
  simdgroups.resize(groups);
  for (u32 i = 0; i < count; i++) start_fiber(i);
  for (u32 s = 0; s < groups; s++) {
    simdgroups[s].first = s * 32;
    simdgroups[s].size = std::min(32u, count - s * 32);
    simdgroups[s].epoch = simdgroups[s].memory_epoch = 0;
  }
  stats->simdgroups += groups;
  stats->threads += count;
  stats->threadgroups++;
  variables.clear();
  arena_used = 0;
  barrier_epoch = 1;
  memset(arena, 0xff, ARENA);  // NaN as float, half and bfloat
  if (flags & CHECK_RACES) std::fill(shadow.begin(), shadow.end(), Shadow{});
  std::vector<u32> order(groups);
  for (u32 i = 0; i < groups; i++) order[i] = i;
  do {
    if (flags & SHUFFLE_ORDER)
      for (u32 i = groups; i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
    for (u32 k : order) run_simdgroup(simdgroups[k]);
  } while (pass_barrier());
}

// Threadgroups at the edge of a grid that they do not divide are smaller.
static void set_ids(const u32* position, const u32* size, const u32* groups, const u32* grid) {
  u32 width[3];
  for (int i = 0; i < 3; i++) width[i] = std::min(size[i], grid[i] - position[i] * size[i]);
  u32 count = width[0] * width[1] * width[2];
  fibers.resize(count);
  for (u32 k = 0; k < count; k++) {
    ThreadIds& d = fibers[k].ids;
    u32 local[3] = {k % width[0], k / width[0] % width[1], k / width[0] / width[1]};
    for (int i = 0; i < 3; i++) {
      d.position_in_threadgroup[i] = local[i];
      d.threadgroup_position[i] = position[i];
      d.position_in_grid[i] = position[i] * size[i] + local[i];
      d.threads_per_threadgroup[i] = width[i];
      d.dispatch_threads_per_threadgroup[i] = size[i];
      d.threadgroups_per_grid[i] = groups[i];
      d.threads_per_grid[i] = grid[i];
    }
    d.index_in_threadgroup = k;
    d.lane = k & 31;
    d.simdgroup = k >> 5;
    d.simdgroups = (count + 31) / 32;
  }
}

static void trace_buffers(const Buffer* given, BufferStats* buffer_stats, u32 count) {
  buffers.clear();
  device_begin = (u8*)~0ull;
  device_end = nullptr;
  for (u32 i = 0; i < count; i++) {
    memset(&buffer_stats[i], 0, sizeof buffer_stats[i]);
    buffers.push_back({given[i], &buffer_stats[i], std::vector<u32>(given[i].size), std::vector<u32>(given[i].size)});
    device_begin = std::min(device_begin, given[i].base - 4096);
    device_end = std::max(device_end, given[i].base + given[i].size + 4096);
  }
}

static void on_signal(int number, siginfo_t* info, void*) {
  sigset_t mask;
  sigemptyset(&mask);
  sigaddset(&mask, number);
  sigprocmask(SIG_UNBLOCK, &mask, nullptr);
  fail(number == SIGFPE   ? "integer division by zero"
       : number == SIGILL ? "trap"
                          : "bad memory access at %p (misaligned vector or wild pointer)",
       info->si_addr);
}

static void catch_signals() {
  static u8 stack[65536];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGFPE, SIGILL, SIGBUS}) sigaction(number, &action, nullptr);
}

// Run `function` over a grid of `grid` threads in threadgroups of `size`. 0, or 1 with stats->error set.
extern "C" int emu_launch(void* function, const u64* arguments, const u32* grid, const u32* size, const Buffer* given,
                          BufferStats* buffer_stats, u32 count, GridStats* grid_stats, int launch_flags) {
  memset(grid_stats, 0, sizeof *grid_stats);
  stats = grid_stats;
  flags = launch_flags;
  kernel = (decltype(kernel))function;
  kernel_arguments = arguments;
  threadgroup_id = 0;
  current = nullptr;
  memset(block_counts, 0, sizeof block_counts);
  // Apple GPUs flush denormal floats to zero, and keep denormal halves: as conversions of halves do here.
  _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON);
  _MM_SET_DENORMALS_ZERO_MODE(_MM_DENORMALS_ZERO_ON);
  if (u64(size[0]) * size[1] * size[2] > MAX_THREADS) {
    snprintf(stats->error, sizeof stats->error, "threadgroup larger than %u threads", MAX_THREADS);
    return 1;
  }
  if (!stacks) {
    catch_signals();
    int protection = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
    stacks = (u8*)mmap(nullptr, MAX_THREADS * STACK, protection, kind | MAP_NORESERVE, -1, 0);
    arena = (u8*)mmap(nullptr, ARENA, protection, kind, -1, 0);
    shadow.resize(ARENA);
  }
  trace_buffers(given, buffer_stats, count);
  if (__builtin_setjmp(bail_out)) {
    current = nullptr;
    return 1;
  }
  u32 threads[3], groups[3];
  for (int i = 0; i < 3; i++) {
    threads[i] = std::min(size[i], grid[i]);
    groups[i] = threads[i] ? (grid[i] + threads[i] - 1) / threads[i] : 0;
  }
  for (u32 z = 0; z < groups[2]; z++)
    for (u32 y = 0; y < groups[1]; y++)
      for (u32 x = 0; x < groups[0]; x++, threadgroup_id++) {
        const u32 position[3] = {x, y, z};
        set_ids(position, threads, groups, grid);
        run_threadgroup();
      }
  current = nullptr;
  return 0;
}

// ---- compiler support -----------------------------------------------------------------------------------------------

// Conversions to bfloat, to the nearest even, with the result in the low half of xmm0 (libgcc has them from 13 on).
extern "C" __m128i __truncsfbf2(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  u32 rounded = nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return _mm_cvtsi32_si128(rounded & 0xffff);
}
extern "C" __m128i __truncdfbf2(double x) { return __truncsfbf2(float(x)); }

// What -fsanitize-minimal-runtime calls.
#define EMU_UNDEFINED(name)                                                                      \
  extern "C" void __ubsan_handle_##name##_minimal() {                                            \
    if (current) fail("undefined behaviour: %s", #name);                                         \
  }                                                                                              \
  extern "C" void __ubsan_handle_##name##_minimal_abort() { __ubsan_handle_##name##_minimal(); }
EMU_UNDEFINED(shift_out_of_bounds)
EMU_UNDEFINED(out_of_bounds)
EMU_UNDEFINED(divrem_overflow)
EMU_UNDEFINED(type_mismatch)
EMU_UNDEFINED(alignment_assumption)
EMU_UNDEFINED(builtin_unreachable)
EMU_UNDEFINED(missing_return)
