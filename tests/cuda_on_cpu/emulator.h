// Runs the text of csrc/*/cuda.cu as host C++, to prove index logic, synchronisation and numerics without a GPU.
//
// Every CUDA thread of a block is a fiber with a stack of its own; blocks run one after another, and a fiber runs until
// it waits for others, so a run is deterministic. A kernel is refused, with its name, block and thread, when
//   a __syncthreads is reached by some threads only, at different places, or after some threads have returned;
//   a warp collective is reached by some lanes of its mask only, or with different masks, kinds or places;
//   a shuffle reads a lane that takes no part; a launch breaks a limit of the device.
// Shared memory, static and dynamic, is filled with 0xff bytes (NaN, -1) before every block. Environment variable
// WGAN_EXT_EMULATED_ORDER=reverse runs threads and blocks last to first: a barrier missing between a writer and a later
// reader is silent in one order and reads the fill in the other.
//
// Under AddressSanitizer all memory has red zones, shared memory too. Under ThreadSanitizer every CUDA thread is a
// thread of its own and only what orders memory in CUDA orders it there: __syncthreads, __syncwarp and __threadfence,
// not shuffles or votes. Blocks of one launch are ordered, so races between blocks are not seen.
//
// Of PTX there are the instructions of csrc/cuda/ptx.cuh. A copy started by copy_async fills its destination with 0xff
// and is made by wait_copies: whoever reads before that finds NaN, and a thread that returns with copies under way is
// refused. The tensor cores add as coarsely as any of sm_80 or later is known to: see multiply_add.
//
// Not modelled: timing, streams (every call completes before it returns), other PTX, clusters, textures, fast-math
// rounding. Floating-point atomics do not compile: reductions must be deterministic.
#pragma once
#include <link.h>
#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <source_location>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// The language.

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One host thread runs all fibers, so they share its thread-local storage, whose arrays can be found to fill them.
// AddressSanitizer knows no red zones there: the gaps that this alignment leaves behind the arrays become theirs.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static thread_local __attribute__((aligned(65536)))
#else
#define __shared__ static thread_local
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define WGAN_EXT_EMULATED_VECTORS(T, name, alignment2, alignment4)      \
  struct __align__(alignment2) name##2 { T x, y; };                     \
  struct name##3 { T x, y, z; };                                        \
  struct __align__(alignment4) name##4 { T x, y, z, w; };               \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
WGAN_EXT_EMULATED_VECTORS(float, float, 8, 16)
WGAN_EXT_EMULATED_VECTORS(double, double, 16, 16)
WGAN_EXT_EMULATED_VECTORS(int, int, 8, 16)
WGAN_EXT_EMULATED_VECTORS(unsigned char, uchar, 2, 4)
#undef WGAN_EXT_EMULATED_VECTORS
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The machine.

namespace wgan_ext::emulated {

// The emulator's own accesses are not the kernel's: ThreadSanitizer must not see them, and the others lose time there.
#define WGAN_EXT_UNSEEN __attribute__((no_sanitize_thread, no_sanitize_address, no_sanitize_undefined))

constexpr int kRefused = 70;  // exit status of a refused kernel
constexpr unsigned kLanes = 32, kThreads = 1024;
constexpr size_t kStackBytes = size_t{512} << 10, kGuardBytes = size_t{64} << 10;
constexpr size_t kSharedBytes = 48 << 10, kRaisedSharedBytes = 227 << 10;

using Site = std::source_location;

enum class Collective : unsigned char { none, syncwarp, shuffle, ballot, matrices };
enum class State : unsigned char { ready, in_collective, at_barrier, returned };

inline const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::syncwarp:
      return "__syncwarp";
    case Collective::shuffle:
      return "shuffle";
    case Collective::ballot:
      return "vote";
    case Collective::matrices:
      return "matrix instruction";
    case Collective::none:
      break;
  }
  return "none";
}

// Copies of 16 bytes under way.
struct Copy {
  void* to;
  const void* from;
};
constexpr unsigned kCopies = 64;

constexpr size_t kRecordBytes = 48;  // what a lane shows the others in a matrix instruction

struct Thread {
  uint3 index;
  State state;
  // What it waits for, and what it brings.
  Collective kind;
  Site site;
  uint32_t mask;
  uint64_t value;
  unsigned source;  // lane read by a shuffle
  int predicate;
  // Two, used in turn: a lane may reach the next instruction while others still read what it brought to this one.
  __attribute__((aligned(16))) unsigned char records[2][kRecordBytes];
  unsigned record;
  // What it gets.
  uint64_t result;
  uint32_t partner_keys;  // bit l: which of lane l's keys orders this collective
  // Its fiber.
  char* stack;
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void* sanitizer_fiber;  // AddressSanitizer's fake stack, ThreadSanitizer's fiber
  char keys[2];           // addresses that order memory for ThreadSanitizer, used in turn
  unsigned turn;
  Copy copies[kCopies];
  unsigned copy_count;
};

struct Warp {
  uint32_t arrived, present;  // lanes that wait in a collective, lanes that have not returned
};

struct Machine {
  Thread threads[kThreads];
  Warp warps[kThreads / kLanes];
  unsigned fibers, count, current;
  unsigned returned;
  int barrier_predicates;
  unsigned barrier_turn;
  const char* kernel;
  const std::function<void()>* body;
  bool reverse;
  unsigned char* dynamic_shared;
  size_t dynamic_shared_bytes;
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void* sanitizer_fiber;
  const void* host_stack;
  size_t host_stack_bytes;
  char barrier_keys[2], fence_key, start_key, end_key;
};
inline Machine machine;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void refuse(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: ");
  if (machine.kernel != nullptr)
    std::fprintf(stderr, "kernel %s, block (%u, %u, %u): ", machine.kernel, blockIdx.x, blockIdx.y, blockIdx.z);
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(kRefused);
}

inline std::string where(const Thread& thread) {
  const std::string_view path = thread.site.file_name();
  return "thread (" + std::to_string(thread.index.x) + ", " + std::to_string(thread.index.y) + ", " +
         std::to_string(thread.index.z) + ") at " + std::string(path.substr(path.rfind('/') + 1)) + ":" +
         std::to_string(thread.site.line());
}

WGAN_EXT_UNSEEN inline bool same_site(const Thread& a, const Thread& b) {
  return a.site.line() == b.site.line() && a.site.column() == b.site.column() &&
         (a.site.file_name() == b.site.file_name() || std::strcmp(a.site.file_name(), b.site.file_name()) == 0);
}

// What orders memory, as ThreadSanitizer sees it.
WGAN_EXT_UNSEEN inline void release(char* key) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(key);
#else
  static_cast<void>(key);
#endif
}
WGAN_EXT_UNSEEN inline void acquire(char* key) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(key);
#else
  static_cast<void>(key);
#endif
}

// Fibers.

#if defined(__x86_64__)
__attribute__((naked, noinline, no_sanitize_thread)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

// From the fiber of `thread` to the scheduler.
WGAN_EXT_UNSEEN inline void leave(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&thread.sanitizer_fiber, machine.host_stack, machine.host_stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  switch_stack(&thread.stack_pointer, machine.stack_pointer);
#else
  swapcontext(&thread.context, &machine.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.sanitizer_fiber, &machine.host_stack, &machine.host_stack_bytes);
#endif
}

// From the scheduler to the fiber of `thread`, until it leaves.
WGAN_EXT_UNSEEN inline void enter(Thread& thread) {
  machine.current = static_cast<unsigned>(&thread - machine.threads);
  threadIdx = thread.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.sanitizer_fiber, thread.stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread.sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  switch_stack(&machine.stack_pointer, thread.stack_pointer);
#else
  swapcontext(&machine.context, &thread.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.sanitizer_fiber, nullptr, nullptr);
#endif
}

WGAN_EXT_UNSEEN inline void complete_collectives(unsigned warp);

// The life of a fiber: one CUDA thread after another.
WGAN_EXT_UNSEEN inline void live() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.host_stack, &machine.host_stack_bytes);
#endif
  Thread& thread = machine.threads[machine.current];
  for (;;) {
    acquire(&machine.start_key);
    (*machine.body)();
    if (thread.copy_count > 0) refuse("%s returns while its copies are under way", where(thread).c_str());
    release(&machine.end_key);
    thread.state = State::returned;
    ++machine.returned;
    Warp& warp = machine.warps[machine.current / kLanes];
    warp.present &= ~(1u << machine.current % kLanes);
    if (warp.arrived != 0) complete_collectives(machine.current / kLanes);
    leave(thread);
  }
}

WGAN_EXT_UNSEEN inline void create_fibers(unsigned count) {
  for (; machine.fibers < count; ++machine.fibers) {
    Thread& thread = machine.threads[machine.fibers];
    char* memory = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) refuse("no memory for fiber stacks");
    thread.stack = memory + kGuardBytes;
#if defined(__x86_64__)
    // As if switch_stack had been called by a caller of live(): six registers and a return address, then the caller's.
    // Stacks that began at one offset would share a few lines of the cache.
    void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - machine.fibers % 64 * 320) - 8;
    top[6] = reinterpret_cast<void*>(&live);
    thread.stack_pointer = top;
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &live, 0);
#endif
#if defined(__SANITIZE_THREAD__)
    thread.sanitizer_fiber = __tsan_create_fiber(0);
#endif
  }
}

// Collectives.

// Gives the lanes that wait with `first` their results and lets them go on, if all of its mask have arrived.
WGAN_EXT_UNSEEN inline void complete_collective(Thread* lanes, Warp& warp, unsigned first) {
  const uint32_t mask = lanes[first].mask, group = mask & warp.present;
  if (group & ~warp.arrived) return;
  uint32_t votes = 0, keys = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(group >> lane & 1)) continue;
    const Thread& thread = lanes[lane];
    if (thread.mask != mask || thread.kind != lanes[first].kind || !same_site(thread, lanes[first])) return;
    votes |= static_cast<uint32_t>(thread.predicate != 0) << lane;
    keys |= (thread.turn & 1) << lane;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(group >> lane & 1)) continue;
    Thread& thread = lanes[lane];
    thread.partner_keys = keys;
    if (thread.kind == Collective::ballot) thread.result = votes;
    if (thread.kind == Collective::shuffle) {
      if (!(group >> thread.source & 1))
        refuse("shuffle by %s reads lane %u, which takes no part", where(thread).c_str(), thread.source);
      thread.result = lanes[thread.source].value;
    }
    thread.state = State::ready;
  }
  warp.arrived &= ~group;
}

WGAN_EXT_UNSEEN inline void complete_collectives(unsigned warp) {
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (machine.warps[warp].arrived >> lane & 1)
      complete_collective(machine.threads + warp * kLanes, machine.warps[warp], lane);
}

WGAN_EXT_UNSEEN inline Thread& running(Site site) {
  if (machine.kernel == nullptr) refuse("%s:%u: called outside a kernel", site.file_name(), site.line());
  Thread& thread = machine.threads[machine.current];
  thread.site = site;
  return thread;
}

// Waits until the lanes of the mask have arrived; the caller has set what it brings.
WGAN_EXT_UNSEEN inline void meet(Thread& thread, Collective kind, uint32_t mask) {
  const unsigned lane = machine.current % kLanes;
  if (!(mask >> lane & 1))
    refuse("%s by %s: its own lane is not in the mask %08x", name_of(kind), where(thread).c_str(), mask);
  thread.kind = kind;
  thread.mask = mask;
  thread.state = State::in_collective;
  Warp& warp = machine.warps[machine.current / kLanes];
  warp.arrived |= 1u << lane;
  complete_collective(&thread - lane, warp, lane);
  if (thread.state == State::in_collective) leave(thread);
}

WGAN_EXT_UNSEEN inline void sync_warp(uint32_t mask, Site site) {
  Thread& thread = running(site);
  Thread* lanes = machine.threads + machine.current / kLanes * kLanes;
  release(&thread.keys[thread.turn & 1]);
  meet(thread, Collective::syncwarp, mask);
  ++thread.turn;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) acquire(&lanes[lane].keys[thread.partner_keys >> lane & 1]);
}

WGAN_EXT_UNSEEN inline uint32_t vote(uint32_t mask, int predicate, Site site) {
  Thread& thread = running(site);
  thread.predicate = predicate;
  meet(thread, Collective::ballot, mask);
  return static_cast<uint32_t>(thread.result);
}

template <typename T>
WGAN_EXT_UNSEEN T shuffle(uint32_t mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  Thread& thread = running(site);
  thread.value = 0;
  __builtin_memcpy(&thread.value, &value, sizeof value);
  thread.source = source;
  meet(thread, Collective::shuffle, mask);
  __builtin_memcpy(&value, &thread.result, sizeof value);
  return value;
}

// Shows the other lanes of the warp a record of this one's; `of` then tells theirs, until the next but one call.
template <typename Record>
struct Shown {
  static_assert(sizeof(Record) <= kRecordBytes);
  Thread* lanes;
  unsigned turn;
  WGAN_EXT_UNSEEN const Record& of(unsigned lane) const {
    return *reinterpret_cast<const Record*>(lanes[lane].records[turn]);
  }
};
template <typename Record>
WGAN_EXT_UNSEEN Shown<Record> show(const Record& record, Site site) {
  Thread& thread = running(site);
  const unsigned turn = thread.record++ % 2;
  __builtin_memcpy(thread.records[turn], &record, sizeof record);
  meet(thread, Collective::matrices, 0xffffffffu);
  return {&thread - machine.current % kLanes, turn};
}

// The number of threads whose predicate is true.
WGAN_EXT_UNSEEN inline int sync_block(int predicate, Site site) {
  Thread& thread = running(site);
  char* key = &machine.barrier_keys[machine.barrier_turn & 1];
  release(key);
  thread.predicate = predicate;
  thread.state = State::at_barrier;
  leave(thread);
  acquire(key);
  return machine.barrier_predicates;
}

// Opens the block's barrier, or says why it cannot open.
WGAN_EXT_UNSEEN inline void open_barrier() {
  const Thread *first = nullptr, *returned = nullptr;
  int predicates = 0;
  for (unsigned t = 0; t < machine.count; ++t) {
    const Thread& thread = machine.threads[t];
    if (thread.state == State::in_collective)
      refuse("divergent warp collective: %s by %s waits for lanes %08x, not all of which come here",
             name_of(thread.kind), where(thread).c_str(), thread.mask);
    if (thread.state == State::returned) returned = &thread;
    if (thread.state != State::at_barrier) continue;
    if (first == nullptr) first = &thread;
    if (!same_site(thread, *first))
      refuse("divergent __syncthreads: %s, %s", where(*first).c_str(), where(thread).c_str());
    predicates += thread.predicate != 0;
  }
  if (returned != nullptr)
    refuse("__syncthreads after some threads returned: %s waits, thread (%u, %u, %u) has returned",
           where(*first).c_str(), returned->index.x, returned->index.y, returned->index.z);
  for (unsigned t = 0; t < machine.count; ++t) machine.threads[t].state = State::ready;
  machine.barrier_predicates = predicates;
  ++machine.barrier_turn;
}

// Launches.

// The static shared arrays: the thread-local variables of the program, by its symbol table.
struct SharedArray {
  char* data;
  size_t bytes;
};
inline const std::vector<SharedArray>& static_shared() {
  static const std::vector<SharedArray> all = [] {
    struct Segment {
      char* data = nullptr;
      size_t bytes = 0;
    } segment;
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* out) {
          for (int i = 0; i < module->dlpi_phnum; ++i)
            if (module->dlpi_phdr[i].p_type == PT_TLS)
              *static_cast<Segment*>(out) = {static_cast<char*>(module->dlpi_tls_data), module->dlpi_phdr[i].p_memsz};
          return 1;  // the first module is the program
        },
        &segment);
    std::ifstream file("/proc/self/exe", std::ios::binary);
    const auto read = [&](auto* items, size_t count, size_t offset) {
      file.seekg(static_cast<std::streamoff>(offset));
      file.read(reinterpret_cast<char*>(items), static_cast<std::streamsize>(count * sizeof *items));
    };
    ElfW(Ehdr) header;
    read(&header, 1, 0);
    std::vector<ElfW(Shdr)> sections(header.e_shnum);
    read(sections.data(), sections.size(), header.e_shoff);
    std::map<size_t, size_t> sizes;  // by offset
    for (const ElfW(Shdr) & section : sections) {
      if (section.sh_type != SHT_SYMTAB) continue;
      std::vector<ElfW(Sym)> symbols(section.sh_size / sizeof(ElfW(Sym)));
      read(symbols.data(), symbols.size(), section.sh_offset);
      for (const ElfW(Sym) & symbol : symbols)
        if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS && symbol.st_shndx != SHN_UNDEF)
          sizes[symbol.st_value] = symbol.st_size;
    }
    if (!file || sizes.empty() != (segment.bytes == 0))
      refuse("the program's symbol table does not tell its shared arrays");
    std::vector<SharedArray> found;
    for (const auto& [offset, bytes] : sizes) found.push_back({segment.data + offset, bytes});
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(segment.data, segment.bytes);
    for (const SharedArray& array : found) ASAN_UNPOISON_MEMORY_REGION(array.data, array.bytes);
#endif
    return found;
  }();
  return all;
}

// The kernel behind a pointer where a sanitizer's symbolizer is at hand, else the launcher's text.
inline std::string kernel_name(const char* text, const void* address) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  char name[512] = "";
  // The symbolizer looks one byte back, as if at a return address.
  __sanitizer_symbolize_pc(const_cast<char*>(static_cast<const char*>(address)) + 1, "%f", name, sizeof name);
  return std::string(name).find('?') == std::string::npos ? name : text;
#else
  static_cast<void>(address);
  return text;
#endif
}

struct Kernel {
  std::string name;
  size_t shared_limit = kSharedBytes;
  int64_t launches = 0;
};
inline std::map<const void*, Kernel>& kernels() {
  static auto& all = *new std::map<const void*, Kernel>;
  return all;
}

// What ran, for the test that no kernel was forgotten.
inline void print_kernels() {
  for (const auto& [address, kernel] : kernels())
    if (kernel.launches > 0)
      std::printf("emulated kernel %s: %ld launches\n", kernel.name.c_str(), static_cast<long>(kernel.launches));
}

// A size of a grid or block, from whatever integer or dim3 the launcher computed.
struct Extent {
  int64_t x, y = 1, z = 1;
  Extent(dim3 d) : x(d.x), y(d.y), z(d.z) {}
  template <typename T>
    requires std::is_integral_v<T>
  Extent(T n) : x(static_cast<int64_t>(n)) {}
};

WGAN_EXT_UNSEEN inline void run_block() {
  machine.returned = 0;
  for (Warp& warp : machine.warps) warp = {};
  for (unsigned t = 0; t < machine.count; ++t) {
    machine.threads[t].state = State::ready;
    machine.threads[t].record = 0;
    machine.warps[t / kLanes].present |= 1u << t % kLanes;
  }
  release(&machine.start_key);
  while (machine.returned < machine.count) {
    bool moved = false;
    for (unsigned i = 0; i < machine.count; ++i) {
      Thread& thread = machine.threads[machine.reverse ? machine.count - 1 - i : i];
      if (thread.state != State::ready) continue;
      enter(thread);
      moved = true;
    }
    if (!moved) open_barrier();
  }
  acquire(&machine.end_key);
}

inline void run(const char* name, const void* address, Extent grid, Extent block, size_t shared_bytes,
                const std::function<void()>& body) {
  if (machine.kernel != nullptr) refuse("launches a kernel");
  static const bool reverse = [] {
    std::atexit(print_kernels);
    const char* order = std::getenv("WGAN_EXT_EMULATED_ORDER");
    return order != nullptr && std::strcmp(order, "reverse") == 0;
  }();
  machine.reverse = reverse;
  Kernel& kernel = kernels()[address];
  if (kernel.launches == 0) kernel.name = kernel_name(name, address);
  machine.kernel = kernel.name.c_str();
  blockIdx = {};
  const auto demand = [](bool held, const char* what, Extent e) {
    if (!held)
      refuse("%s (%ld, %ld, %ld) breaks the device's limits", what, static_cast<long>(e.x), static_cast<long>(e.y),
             static_cast<long>(e.z));
  };
  demand(grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535,
         "grid", grid);
  demand(block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= kThreads && block.y <= kThreads && block.z <= 64 &&
             block.x * block.y * block.z <= kThreads,
         "block", block);
  if (shared_bytes > kernel.shared_limit)
    refuse("%zu bytes of dynamic shared memory, the limit is %zu", shared_bytes, kernel.shared_limit);
  ++kernel.launches;

  gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  blockDim = dim3(static_cast<unsigned>(block.x), static_cast<unsigned>(block.y), static_cast<unsigned>(block.z));
  machine.count = blockDim.x * blockDim.y * blockDim.z;
  machine.body = &body;
  machine.dynamic_shared = static_cast<unsigned char*>(std::malloc(shared_bytes));  // 16-byte aligned, as in CUDA
  machine.dynamic_shared_bytes = shared_bytes;
  create_fibers(machine.count);
#if defined(__SANITIZE_THREAD__)
  machine.sanitizer_fiber = __tsan_get_current_fiber();
#endif
  const std::vector<SharedArray>& statics = static_shared();
  for (unsigned t = 0; t < machine.count; ++t)
    machine.threads[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
  const int64_t blocks = grid.x * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = machine.reverse ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / (grid.x * grid.y))};
    std::memset(machine.dynamic_shared, 0xff, shared_bytes);
    for (const SharedArray& array : statics) std::memset(array.data, 0xff, array.bytes);
    run_block();
  }
  std::free(machine.dynamic_shared);
  machine.dynamic_shared = nullptr;
  machine.kernel = nullptr;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Extent grid, Extent block, size_t shared_bytes,
            Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "a kernel takes no default arguments");
  const std::tuple<Parameters...> values{static_cast<Parameters>(arguments)...};
  run(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [&] { std::apply(kernel, std::tuple<Parameters...>(values)); });
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(machine.dynamic_shared);
}

}  // namespace wgan_ext::emulated

#define WGAN_EXT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                  \
  do {                                                                                                   \
    static_cast<void>(static_cast<cudaStream_t>(stream));                                                \
    ::wgan_ext::emulated::launch(#kernel, kernel, grid, block, shared_bytes __VA_OPT__(, ) __VA_ARGS__); \
  } while (0)

#define WGAN_EXT_DYNAMIC_SHARED(T, name) T* name = ::wgan_ext::emulated::dynamic_shared<T>()

// Synchronisation, shuffles, votes. Each remembers where it was called.

inline void __syncthreads(wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  wgan_ext::emulated::sync_block(0, site);
}
inline int __syncthreads_count(int predicate, wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  return wgan_ext::emulated::sync_block(predicate, site);
}
inline int __syncthreads_or(int predicate, wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  return wgan_ext::emulated::sync_block(predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  return wgan_ext::emulated::sync_block(predicate, site) == static_cast<int>(wgan_ext::emulated::machine.count);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  wgan_ext::emulated::sync_warp(mask, site);
}
inline void __threadfence() {
  wgan_ext::emulated::acquire(&wgan_ext::emulated::machine.fence_key);
  wgan_ext::emulated::release(&wgan_ext::emulated::machine.fence_key);
}
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  return wgan_ext::emulated::vote(mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate,
                      wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  return wgan_ext::emulated::vote(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  return wgan_ext::emulated::vote(mask, !predicate, site) == 0;
}

// A segment of `width` lanes is a small warp; a lane whose source lies outside it gets its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  const int lane = static_cast<int>(wgan_ext::emulated::machine.current) % warpSize;
  return wgan_ext::emulated::shuffle(mask, value, (lane & -width) + (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  const int lane = static_cast<int>(wgan_ext::emulated::machine.current) % warpSize, source = lane ^ bits;
  return wgan_ext::emulated::shuffle(mask, value, source < (lane & -width) + width ? source : lane, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  const int lane = static_cast<int>(wgan_ext::emulated::machine.current) % warpSize;
  const int source = lane + static_cast<int>(delta);
  return wgan_ext::emulated::shuffle(mask, value, source < (lane & -width) + width ? source : lane, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 wgan_ext::emulated::Site site = wgan_ext::emulated::Site::current()) {
  const int lane = static_cast<int>(wgan_ext::emulated::machine.current) % warpSize;
  const int source = lane - static_cast<int>(delta);
  return wgan_ext::emulated::shuffle(mask, value, source >= (lane & -width) ? source : lane, site);
}

// The instructions of csrc/cuda/ptx.cuh.

namespace wgan_ext::device {

inline float quick_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;  // NaN stays
}

inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

inline void copy_async(void* shared, const void* global, emulated::Site site = emulated::Site::current()) {
  emulated::Thread& thread = emulated::running(site);
  if (thread.copy_count == emulated::kCopies) emulated::refuse("more copies under way than the emulator counts");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    emulated::refuse("copy_async by %s of addresses that are not aligned to 16", emulated::where(thread).c_str());
  thread.copies[thread.copy_count++] = {shared, global};
  std::memset(shared, 0xff, 16);
}

inline void wait_copies(emulated::Site site = emulated::Site::current()) {
  emulated::Thread& thread = emulated::running(site);
  for (unsigned i = 0; i < thread.copy_count; ++i) std::memcpy(thread.copies[i].to, thread.copies[i].from, 16);
  thread.copy_count = 0;
}

inline void load_matrices(uint32_t (&to)[4], const void* row, emulated::Site site = emulated::Site::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    emulated::refuse("load_matrices by %s of an address that is not aligned to 16",
                     emulated::where(emulated::running(site)).c_str());
  struct Row {
    uint32_t words[4];
  } mine;
  std::memcpy(&mine, row, sizeof mine);
  const auto rows = emulated::show(mine, site);
  const unsigned lane = emulated::machine.current % emulated::kLanes;
  for (unsigned k = 0; k < 4; ++k) to[k] = rows.of(8 * k + lane / 4).words[lane % 4];
}

// a and b of a lane as numbers.
struct Operands {
  float a[4][2], b[2][2];
};
WGAN_EXT_UNSEEN inline void widen_halves(float (&to)[2], uint32_t halves) {
  _Float16 values[2];
  __builtin_memcpy(values, &halves, sizeof values);
  to[0] = static_cast<float>(values[0]);
  to[1] = static_cast<float>(values[1]);
}

// c + sum of x[k] y[k], as a tensor core does it: exact products, cut towards zero at 2^-24 of the power of two of the
// greatest addend, and a sum cut towards zero to float (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021;
// newer ones keep more bits).
WGAN_EXT_UNSEEN inline float tensor_sum(float c, const float (&x)[16], const float (&y)[16]) {
  double addends[17], most = 0, plain = c;
  addends[16] = c;
  for (int k = 0; k < 16; ++k) plain += addends[k] = static_cast<double>(x[k]) * y[k];
  if (!(plain - plain == 0)) return static_cast<float>(plain);  // infinite or NaN
  for (const double addend : addends) most = most < std::abs(addend) ? std::abs(addend) : most;
  if (most == 0) return 0;
  uint64_t power;  // of two, of `most`
  __builtin_memcpy(&power, &most, sizeof power);
  power &= uint64_t{0x7ff} << 52;
  double unit;
  __builtin_memcpy(&unit, &power, sizeof unit);
  unit *= 0x1p-24;
  const double inverse = 1 / unit;
  int64_t sum = 0;
  for (const double addend : addends) sum += static_cast<int64_t>(addend * inverse);
  const double exact = static_cast<double>(sum) * unit;
  const float rounded = static_cast<float>(exact);
  return std::abs(static_cast<double>(rounded)) <= std::abs(exact) ? rounded : std::nextafter(rounded, 0.0f);
}

WGAN_EXT_UNSEEN inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         emulated::Site site = emulated::Site::current()) {
  Operands mine;
  for (int i = 0; i < 4; ++i) widen_halves(mine.a[i], a[i]);
  widen_halves(mine.b[0], b0);
  widen_halves(mine.b[1], b1);
  const auto lanes = emulated::show(mine, site);
  const unsigned lane = emulated::machine.current % emulated::kLanes, g = lane / 4, t = lane % 4;
  float rows[2][16], columns[2][16];
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned holder = k % 8 / 2, high = k / 8, odd = k % 2;
    for (unsigned i = 0; i < 2; ++i) {
      rows[i][k] = lanes.of(4 * g + holder).a[2 * high + i][odd];
      columns[i][k] = lanes.of(4 * (2 * t + i) + holder).b[high][odd];
    }
  }
  for (unsigned i = 0; i < 4; ++i) c[i] = tensor_sum(c[i], rows[i / 2], columns[i % 2]);
}

}  // namespace wgan_ext::device

// Atomics: on integers only, and ordering nothing, as in CUDA.

template <typename T>
concept WganExtAtomic = std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <WganExtAtomic T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*p).fetch_add(value, std::memory_order_relaxed);
}
template <WganExtAtomic T>
T atomicSub(T* p, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*p).fetch_sub(value, std::memory_order_relaxed);
}
template <WganExtAtomic T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*p).exchange(value, std::memory_order_relaxed);
}
template <WganExtAtomic T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*p).fetch_or(value, std::memory_order_relaxed);
}
template <WganExtAtomic T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*p).fetch_and(value, std::memory_order_relaxed);
}
template <WganExtAtomic T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  std::atomic_ref<T>(*p).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
  return expected;
}
template <WganExtAtomic T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  T old = std::atomic_ref<T>(*p).load(std::memory_order_relaxed);
  while (old < value && !std::atomic_ref<T>(*p).compare_exchange_weak(old, value, std::memory_order_relaxed)) continue;
  return old;
}
template <WganExtAtomic T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  T old = std::atomic_ref<T>(*p).load(std::memory_order_relaxed);
  while (value < old && !std::atomic_ref<T>(*p).compare_exchange_weak(old, value, std::memory_order_relaxed)) continue;
  return old;
}

// Loads, bits, arithmetic.

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

template <typename To, typename From>
inline To wgan_ext_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
inline int __float_as_int(float x) { return wgan_ext_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return wgan_ext_bits<unsigned>(x); }
inline float __int_as_float(int x) { return wgan_ext_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return wgan_ext_bits<float>(x); }
inline long long __double_as_longlong(double x) { return wgan_ext_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return wgan_ext_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __frsqrt_rn(float x) { return 1 / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

// As in CUDA: of two numbers, the one that is not NaN.
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// The runtime. Device memory is host memory, filled like shared memory; every call completes before it returns.

struct CUstream_st;
struct CUevent_st {
  bool asked;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorNotReady = 600 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
constexpr unsigned cudaEventDefault = 0, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0, cudaHostAllocMapped = 2;

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : status == cudaErrorNotReady ? "device not ready" : "emulated error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes); }
template <typename T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(std::malloc(bytes));
  if (*p == nullptr) return cudaErrorMemoryAllocation;
  std::memset(static_cast<void*>(*p), 0xff, bytes);
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned = 0) {
  return cudaMalloc(p, bytes);
}
template <typename T>
cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned) {
  return cudaMalloc(p, bytes);
}
template <typename T>
cudaError_t cudaMallocAsync(T** p, size_t bytes, cudaStream_t) {
  return cudaMalloc(p, bytes);
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st{};
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = nullptr) {
  event->asked = false;
  return cudaSuccess;
}
// Not ready when first asked after a record, so that polling loops turn.
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  const bool ready = event->asked;
  event->asked = true;
  return ready ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small device, so that loops over the grid turn more than once.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = wgan_ext::emulated::kThreads;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = wgan_ext::emulated::kRaisedSharedBytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > wgan_ext::emulated::kRaisedSharedBytes) return cudaErrorInvalidValue;
  wgan_ext::emulated::kernels()[reinterpret_cast<const void*>(kernel)].shared_limit = static_cast<size_t>(value);
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int threads, size_t) {
  *blocks = threads <= 1024 ? 2048 / threads : 0;
  return cudaSuccess;
}
