// Hopper's wgmma products, mbarriers and register reallocation. On the host, loops over exchanged values.
#pragma once

#include "tensor_core.h"

// Defined where code for Hopper itself (sm_90a) is generated, and on the host.
#if defined(JINACLIP_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define JINACLIP_WARPGROUPS
#endif

namespace jinaclip {

constexpr int kHopperKeys = 96;  // of a tile

#ifdef JINACLIP_HOST

// A barrier whose phase ends when so many warps have arrived.
class Arrivals {
 public:
  void expect(unsigned count) {
    count_ = count;
    arrived_ = phase_ = 0;
  }
  void arrive() {
    host_shim::state().moved = true;
    if (++arrived_ == count_) {
      arrived_ = 0;
      phase_ ^= 1;
    }
  }
  // Until the phase of this parity has ended.
  void wait(unsigned parity) {
    while (phase_ == parity) {
      host_shim::yield();
    }
  }

 private:
  unsigned count_, arrived_, phase_;
};

inline void publish_copies() {}
inline void publish_barriers() {}
inline void prefetch(const void*) {}
template <int Count>
void fewer_registers() {}
template <int Count>
void more_registers() {}

inline float tile_value(const __half* tile, int row, int column) {
  return __half2float(tile[tile_at(row, column / 8) + column % 8]);
}

// scores = queries [64, 64] keys' [64, Keys] of a warpgroup; queries are a tile of 64 rows, keys the first of another.
template <int Keys>
void start_scores(float (&scores)[kHopperKeys / 8][4], const __half* queries, const __half* keys) {
  const int row = threadIdx.x / 32 % 4 * 16 + host_shim::lane() / 4, column = host_shim::lane() % 4 * 2;
  for (int g = 0; g < Keys / 8; ++g) {
    for (int i = 0; i < 4; ++i) {
      scores[g][i] = 0.0f;
      for (int k = 0; k < kTileColumns; ++k) {
        scores[g][i] += tile_value(queries, row + i / 2 * 8, k) * tile_value(keys, 8 * g + column + i % 2, k);
      }
    }
  }
}

// outputs += weights [64, Keys] values [Keys, 64] of a warpgroup; values are the first rows of a tile.
template <int Keys>
void start_outputs(float (&outputs)[8][4], const uint32_t (&weights)[kHopperKeys / 16][4], const __half* values) {
  const int row = host_shim::lane() / 4, column = host_shim::lane() % 4 * 2;
  for (int k = 0; k < Keys / 16; ++k) {
    const host_shim::Exchange<WordsOfA> of_lanes({weights[k][0], weights[k][1], weights[k][2], weights[k][3]});
    float rows[2][16];
    row_of_a(of_lanes, row, rows[0]);
    row_of_a(of_lanes, row + 8, rows[1]);
    for (int g = 0; g < 8; ++g) {
      for (int i = 0; i < 4; ++i) {
        for (int key = 0; key < 16; ++key) {
          outputs[g][i] += rows[i / 2][key] * tile_value(values, 16 * k + key, 8 * g + column + i % 2);
        }
      }
    }
  }
}

// Until at most so many of the products that were started are under way.
template <int Most, int Groups>
void finish_products(float (&)[Groups][4]) {}

#elif defined(__CUDACC__)

class Arrivals {
 public:
  __device__ void expect(unsigned count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
  }
  __device__ void arrive() { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address()) : "memory"); }
  // Until the phase of this parity has ended.
  __device__ void wait(unsigned parity) {
#ifdef JINACLIP_WARPGROUPS
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(address()),
        "r"(parity)
        : "memory");
#endif
  }

 private:
  __device__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&state_)); }
  uint64_t state_;
};

// Makes what this thread has written to shared memory visible to warpgroup products, once others know of it.
__device__ inline void publish_copies() {
#ifdef JINACLIP_WARPGROUPS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Orders the initialisation of barriers before their use by other threads.
__device__ inline void publish_barriers() {
#ifdef JINACLIP_WARPGROUPS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Prefetches a cache line into L2.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Registers for each thread of this warpgroup (setmaxnreg).
template <int Count>
__device__ inline void fewer_registers() {
#ifdef JINACLIP_WARPGROUPS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}
template <int Count>
__device__ inline void more_registers() {
#ifdef JINACLIP_WARPGROUPS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// Low half of a wgmma matrix descriptor: the tile's address in units of 16 bytes. The high half, in JINACLIP_PART, is
// the same for all tiles: 128-byte swizzle, groups of eight rows 1024 bytes apart.
__device__ inline uint32_t tile_descriptor(const __half* tile) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(tile)) >> 4 | 1u << 16;
}

// PTX of one product: fence, one wgmma for each 16 columns (scores) or 16 rows (outputs), commit. `offset` is the
// step's place in the tile, in units of 16 bytes. add = 0 overwrites the results.
#define JINACLIP_BEGIN_PRODUCT "{\n.reg .b64 part, rows;\n.reg .b32 low;\n.reg .pred add;\nwgmma.fence.sync.aligned;\n"
#define JINACLIP_PART(name, low_half, offset) \
  "add.u32 low, " low_half ", " #offset ";\nmov.b64 " name ", {low, 0x40000040};\n"
#define JINACLIP_STEP(add, shape, results, operands, transposed)                                                 \
  "setp.ne.b32 add, " #add ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32.f16.f16 {" results "}, " operands \
  ", add, 1, 1, " transposed ";\n"
#define JINACLIP_END_PRODUCT "wgmma.commit_group.sync.aligned;\n}"
#define JINACLIP_SCORES_STEP(add, shape, results, queries, keys, offset)                        \
  JINACLIP_PART("rows", queries, offset)                                                        \
  JINACLIP_PART("part", keys, offset) JINACLIP_STEP(add, shape, results, "rows, part", "0, 0")
#define JINACLIP_OUTPUTS_STEP(weights, values, offset) \
  JINACLIP_PART("part", values, offset)                \
  JINACLIP_STEP(1, "m64n64k16", JINACLIP_RESULTS_32, "{" weights "}, part", "1")
// Operands of four values.
#define JINACLIP_FOUR(constraint, values, g) \
  constraint(values[g][0]), constraint(values[g][1]), constraint(values[g][2]), constraint(values[g][3])
#define JINACLIP_RESULTS_24 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define JINACLIP_RESULTS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JINACLIP_RESULTS_48 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"

// scores = queries [64, 64] keys' [64, Keys] of a warpgroup; queries are a tile of 64 rows, keys the first of another.
template <int Keys>
__device__ void start_scores(float (&scores)[kHopperKeys / 8][4], const __half* queries, const __half* keys);

template <>
__device__ inline void start_scores<96>(float (&scores)[kHopperKeys / 8][4], const __half* queries,
                                        const __half* keys) {
#ifdef JINACLIP_WARPGROUPS
  asm volatile(
      JINACLIP_BEGIN_PRODUCT
      JINACLIP_SCORES_STEP(0, "m64n96k16", JINACLIP_RESULTS_48, "%48", "%49", 0)
      JINACLIP_SCORES_STEP(1, "m64n96k16", JINACLIP_RESULTS_48, "%48", "%49", 2)
      JINACLIP_SCORES_STEP(1, "m64n96k16", JINACLIP_RESULTS_48, "%48", "%49", 4)
      JINACLIP_SCORES_STEP(1, "m64n96k16", JINACLIP_RESULTS_48, "%48", "%49", 6)
      JINACLIP_END_PRODUCT
      : JINACLIP_FOUR("=f", scores, 0), JINACLIP_FOUR("=f", scores, 1), JINACLIP_FOUR("=f", scores, 2),
        JINACLIP_FOUR("=f", scores, 3), JINACLIP_FOUR("=f", scores, 4), JINACLIP_FOUR("=f", scores, 5),
        JINACLIP_FOUR("=f", scores, 6), JINACLIP_FOUR("=f", scores, 7), JINACLIP_FOUR("=f", scores, 8),
        JINACLIP_FOUR("=f", scores, 9), JINACLIP_FOUR("=f", scores, 10), JINACLIP_FOUR("=f", scores, 11)
      : "r"(tile_descriptor(queries)), "r"(tile_descriptor(keys))
      : "memory");
#endif
}

template <>
__device__ inline void start_scores<48>(float (&scores)[kHopperKeys / 8][4], const __half* queries,
                                        const __half* keys) {
#ifdef JINACLIP_WARPGROUPS
  asm volatile(
      JINACLIP_BEGIN_PRODUCT
      JINACLIP_SCORES_STEP(0, "m64n48k16", JINACLIP_RESULTS_24, "%24", "%25", 0)
      JINACLIP_SCORES_STEP(1, "m64n48k16", JINACLIP_RESULTS_24, "%24", "%25", 2)
      JINACLIP_SCORES_STEP(1, "m64n48k16", JINACLIP_RESULTS_24, "%24", "%25", 4)
      JINACLIP_SCORES_STEP(1, "m64n48k16", JINACLIP_RESULTS_24, "%24", "%25", 6)
      JINACLIP_END_PRODUCT
      : JINACLIP_FOUR("=f", scores, 0), JINACLIP_FOUR("=f", scores, 1), JINACLIP_FOUR("=f", scores, 2),
        JINACLIP_FOUR("=f", scores, 3), JINACLIP_FOUR("=f", scores, 4), JINACLIP_FOUR("=f", scores, 5)
      : "r"(tile_descriptor(queries)), "r"(tile_descriptor(keys))
      : "memory");
#endif
}

// outputs += weights [64, Keys] values [Keys, 64] of a warpgroup; values are the first rows of a tile.
template <int Keys>
__device__ void start_outputs(float (&outputs)[8][4], const uint32_t (&weights)[kHopperKeys / 16][4],
                              const __half* values);

template <>
__device__ inline void start_outputs<96>(float (&outputs)[8][4], const uint32_t (&weights)[kHopperKeys / 16][4],
                                         const __half* values) {
#ifdef JINACLIP_WARPGROUPS
  asm volatile(
      JINACLIP_BEGIN_PRODUCT
      JINACLIP_OUTPUTS_STEP("%32, %33, %34, %35", "%56", 0)
      JINACLIP_OUTPUTS_STEP("%36, %37, %38, %39", "%56", 128)
      JINACLIP_OUTPUTS_STEP("%40, %41, %42, %43", "%56", 256)
      JINACLIP_OUTPUTS_STEP("%44, %45, %46, %47", "%56", 384)
      JINACLIP_OUTPUTS_STEP("%48, %49, %50, %51", "%56", 512)
      JINACLIP_OUTPUTS_STEP("%52, %53, %54, %55", "%56", 640)
      JINACLIP_END_PRODUCT
      : JINACLIP_FOUR("+f", outputs, 0), JINACLIP_FOUR("+f", outputs, 1), JINACLIP_FOUR("+f", outputs, 2),
        JINACLIP_FOUR("+f", outputs, 3), JINACLIP_FOUR("+f", outputs, 4), JINACLIP_FOUR("+f", outputs, 5),
        JINACLIP_FOUR("+f", outputs, 6), JINACLIP_FOUR("+f", outputs, 7)
      : JINACLIP_FOUR("r", weights, 0), JINACLIP_FOUR("r", weights, 1), JINACLIP_FOUR("r", weights, 2),
        JINACLIP_FOUR("r", weights, 3), JINACLIP_FOUR("r", weights, 4), JINACLIP_FOUR("r", weights, 5),
        "r"(tile_descriptor(values))
      : "memory");
#endif
}

template <>
__device__ inline void start_outputs<48>(float (&outputs)[8][4], const uint32_t (&weights)[kHopperKeys / 16][4],
                                         const __half* values) {
#ifdef JINACLIP_WARPGROUPS
  asm volatile(
      JINACLIP_BEGIN_PRODUCT
      JINACLIP_OUTPUTS_STEP("%32, %33, %34, %35", "%44", 0)
      JINACLIP_OUTPUTS_STEP("%36, %37, %38, %39", "%44", 128)
      JINACLIP_OUTPUTS_STEP("%40, %41, %42, %43", "%44", 256)
      JINACLIP_END_PRODUCT
      : JINACLIP_FOUR("+f", outputs, 0), JINACLIP_FOUR("+f", outputs, 1), JINACLIP_FOUR("+f", outputs, 2),
        JINACLIP_FOUR("+f", outputs, 3), JINACLIP_FOUR("+f", outputs, 4), JINACLIP_FOUR("+f", outputs, 5),
        JINACLIP_FOUR("+f", outputs, 6), JINACLIP_FOUR("+f", outputs, 7)
      : JINACLIP_FOUR("r", weights, 0), JINACLIP_FOUR("r", weights, 1), JINACLIP_FOUR("r", weights, 2),
        "r"(tile_descriptor(values))
      : "memory");
#endif
}

#undef JINACLIP_BEGIN_PRODUCT
#undef JINACLIP_PART
#undef JINACLIP_STEP
#undef JINACLIP_SCORES_STEP
#undef JINACLIP_OUTPUTS_STEP
#undef JINACLIP_END_PRODUCT
#undef JINACLIP_FOUR
#undef JINACLIP_RESULTS_24
#undef JINACLIP_RESULTS_32
#undef JINACLIP_RESULTS_48

// Until at most so many of the products that were started are under way; `results` are those of one that has ended.
template <int Most, int Groups>
__device__ inline void finish_products(float (&results)[Groups][4]) {
#ifdef JINACLIP_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Most) : "memory");
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    asm volatile("" : "+f"(results[g][0]), "+f"(results[g][1]), "+f"(results[g][2]), "+f"(results[g][3])::"memory");
  }
#endif
}

#endif

}  // namespace jinaclip
