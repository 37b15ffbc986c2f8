// Runs CUDA kernels on the host, so that their sources can be tested where there is no GPU.
//
// The threads of a block are fibres of one operating-system thread. A fibre runs until it waits (__syncthreads, an
// exchange within its warp, or Arrivals::wait) or ends; then the next one runs. Blocks run one after the other, every
// second one with its threads in reverse order. A block whose threads all wait for one another ends the process with a
// message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifndef __FLT16_MAX__
#error "The host build needs a compiler with _Float16 (g++ 12 or newer)"
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define threadIdx (host_shim::state().fibre->index)
#define blockIdx (host_shim::state().block_index)
#define blockDim (host_shim::state().block)
#define gridDim (host_shim::state().grid)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

namespace host_shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

// Threads that wait for one another: a block, or a warp.
struct Barrier {
  unsigned members = 0;
  unsigned arrived = 0;
  unsigned generation = 0;

  void open_if_complete() {
    if (members != 0 && arrived == members) {
      arrived = 0;
      ++generation;
    }
  }
};

constexpr size_t kExchangedBytes = 64;  // of one lane

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char exchanged[2][kWarp][kExchangedBytes];
};

struct Fibre {
  dim3 index;
  unsigned number = 0;
  bool started = false;
  bool ended = false;
  jmp_buf place;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct State {
  dim3 grid, block, block_index;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Warp> warps;
  Barrier all;
  Fibre* fibre = nullptr;
  const std::function<void()>* kernel = nullptr;
  jmp_buf scheduler;
  ucontext_t origin;
  bool moved = false;
};

inline State& state() {
  static thread_local State instance;
  return instance;
}

inline void yield() {
  State& s = state();
  if (_setjmp(s.fibre->place) == 0) {
    _longjmp(s.scheduler, 1);
  }
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  barrier.open_if_complete();
  while (barrier.generation == generation) {
    yield();
  }
  state().moved = true;
}

inline void leave(Barrier& barrier) {
  --barrier.members;
  barrier.open_if_complete();
}

inline void fibre_main() {
  State& s = state();
  for (;;) {
    (*s.kernel)();
    Fibre& self = *s.fibre;
    self.ended = true;
    s.moved = true;
    leave(s.all);
    leave(s.warps[self.number / kWarp].barrier);
    yield();
  }
}

inline void resume(Fibre& fibre) {
  State& s = state();
  s.fibre = &fibre;
  if (_setjmp(s.scheduler) == 0) {
    if (!fibre.started) {
      fibre.started = true;
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get();
      fibre.context.uc_stack.ss_size = kStackBytes;
      fibre.context.uc_link = nullptr;
      makecontext(&fibre.context, fibre_main, 0);
      setcontext(&fibre.context);
    }
    _longjmp(fibre.place, 1);
  }
}

inline void run_block(unsigned threads, bool reversed) {
  State& s = state();
  s.all = {threads, 0, 0};
  s.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  for (unsigned number = 0; number < threads; ++number) {
    Fibre& fibre = *s.fibres[number];
    fibre.index = dim3(number % s.block.x, number / s.block.x % s.block.y, number / (s.block.x * s.block.y));
    fibre.number = number;
    fibre.ended = false;
    ++s.warps[number / kWarp].barrier.members;
  }
  unsigned ended = 0;
  while (ended < threads) {
    s.moved = false;
    for (unsigned turn = 0; turn < threads; ++turn) {
      Fibre& fibre = *s.fibres[reversed ? threads - 1 - turn : turn];
      if (!fibre.ended) {
        resume(fibre);
        ended += fibre.ended ? 1 : 0;
      }
    }
    if (!s.moved && ended < threads) {
      std::fputs("host_shim: the threads of a block wait for one another\n", stderr);
      std::abort();
    }
  }
}

inline void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  State& s = state();
  s.grid = grid;
  s.block = block;
  s.kernel = &kernel;
  const unsigned threads = block.x * block.y * block.z;
  while (s.fibres.size() < threads) {
    s.fibres.push_back(std::make_unique<Fibre>());
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        s.block_index = dim3(x, y, z);
        run_block(threads, (x + y + z) % 2 == 1);
      }
    }
  }
}

}  // namespace host_shim

inline void __syncthreads() { host_shim::wait(host_shim::state().all); }

namespace host_shim {

inline unsigned lane() { return state().fibre->number % kWarp; }

// What every lane of the warp gives, by lane. Two slots in turn: a lane cannot be two exchanges ahead of another one of
// its warp.
template <typename T>
class Exchange {
 public:
  explicit Exchange(const T& mine) {
    static_assert(sizeof(T) <= kExchangedBytes);
    Warp& warp = state().warps[state().fibre->number / kWarp];
    slots_ = warp.exchanged[warp.barrier.generation % 2];
    std::memcpy(slots_[lane()], &mine, sizeof mine);
    wait(warp.barrier);
  }
  T operator[](unsigned of_lane) const {
    T value;
    std::memcpy(&value, slots_[of_lane], sizeof value);
    return value;
  }

 private:
  unsigned char (*slots_)[kExchangedBytes];
};

}  // namespace host_shim

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  return host_shim::Exchange<float>(value)[host_shim::lane() ^ static_cast<unsigned>(lane_mask)];
}

inline unsigned __ballot_sync(unsigned, bool value) {
  const host_shim::Exchange<bool> values(value);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < host_shim::kWarp; ++lane) {
    ballot |= static_cast<unsigned>(values[lane]) << lane;
  }
  return ballot;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return host_shim::Exchange<T>(value)[static_cast<unsigned>(lane)];
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline void __syncwarp() { host_shim::Exchange<char>(0); }
