// Rows held in registers: vector loads and stores, sums over a row, and its normalisation.
//
// A row of C columns is handled by Threads threads (one warp, or one block of more). Thread `lane` holds Groups groups
// of Width neighbouring columns; group g begins at column (g * Threads + lane) * Width, so that the loads of a warp are
// contiguous. Everything is computed in float32. A row has the same bits in each shape of up to 1024 columns: sums are
// of a group's columns, then of groups 32 * Width columns apart in their order, then over the lanes of a warp.
#pragma once

#include "device.h"

namespace jinaclip {

constexpr int kWarp = 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, float& y) { y = x; }
__device__ inline void from_float(float x, __half& y) { y = __float2half_rn(x); }

// Width elements as one memory access, or as several of 16 bytes.
template <typename T, int Width>
struct alignas(sizeof(T) * Width < 16 ? sizeof(T) * Width : 16) Pack {
  T items[Width];
};

template <int Width, typename T>
__device__ inline void load(const T* from, float (&values)[Width]) {
#ifdef JINACLIP_HOST  // where constants of a graph need not be aligned
  for (int i = 0; i < Width; ++i) {
    values[i] = to_float(from[i]);
  }
#else
  const Pack<T, Width> pack = *reinterpret_cast<const Pack<T, Width>*>(from);
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    values[i] = to_float(pack.items[i]);
  }
#endif
}

template <int Width, typename T>
__device__ inline void store(T* to, const float (&values)[Width]) {
  Pack<T, Width> pack;
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    from_float(values[i], pack.items[i]);
  }
  *reinterpret_cast<Pack<T, Width>*>(to) = pack;
}

// The sum of `value` over the threads of a row, the same in each of them. A block that has more than one warp to a row
// has one row, and calls each Stage once.
template <int Threads, int Stage>
__device__ inline float row_sum(float value) {
  if constexpr (Threads > kWarp) {
    __shared__ float of_warps[Threads / kWarp][kWarp];
    of_warps[threadIdx.x / kWarp][threadIdx.x % kWarp] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Threads / kWarp; ++warp) {
      value += of_warps[warp][threadIdx.x % kWarp];
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The sum of a thread's values, and of their squares; one fused multiply-add a square, whatever the compiler chooses.
template <int Groups, int Width>
__device__ inline float sum_of(const float (&values)[Groups][Width]) {
  float sum = 0.0f;
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    float of_group = values[g][0];
#pragma unroll
    for (int i = 1; i < Width; ++i) {
      of_group += values[g][i];
    }
    sum += of_group;
  }
  return sum;
}

template <int Groups, int Width>
__device__ inline float sum_of_squares(const float (&values)[Groups][Width]) {
  float sum = 0.0f;
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    float of_group = 0.0f;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      of_group = fmaf(values[g][i], values[g][i], of_group);
    }
    sum += of_group;
  }
  return sum;
}

// Subtracts the mean of a row and divides by sqrt(variance + epsilon). Values at columns from `columns` on are zero
// before and after.
template <int Threads, int Groups, int Width>
__device__ inline void normalise(float (&values)[Groups][Width], int lane, int columns, float epsilon) {
  const float count = static_cast<float>(columns);
  const float mean = fast_divide(row_sum<Threads, 0>(sum_of(values)), count);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * Width;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[g][i] = column + i < columns ? values[g][i] - mean : 0.0f;
    }
  }
  const float scale =
      reciprocal_root(fast_divide(row_sum<Threads, 1>(sum_of_squares(values)), count) + epsilon);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[g][i] *= scale;
    }
  }
}

// Gain and bias of a thread's columns. They are loaded with the row where they fit in registers beside it: then memory
// is waited for once.
template <int Threads, int Groups, int Width>
class GainAndBias {
 public:
  __device__ GainAndBias(const float* __restrict__ gain, const float* __restrict__ bias, int lane, int columns)
      : gain_(gain), bias_(bias), lane_(lane), columns_(columns) {
    if (kEarly) {
      read(0);
    }
  }

  __device__ void apply(int group, float (&values)[Width]) {
    if (!kEarly) {
      read(group);
    }
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[i] = fmaf(values[i], gains_[i], biases_[i]);
    }
  }

 private:
  static constexpr bool kEarly = Groups == 1;

  __device__ void read(int group) {
    const int column = (group * Threads + lane_) * Width;
    const int at = column + Width <= columns_ ? column : 0;
    load(gain_ + at, gains_);
    load(bias_ + at, biases_);
  }

  const float *gain_, *bias_;
  int lane_, columns_;
  float gains_[Width], biases_[Width];
};

// The same for a row of any width and alignment, read from memory three times: `load_column(column)` gives a value,
// `store_column(column, normalised)` takes it.
template <int Threads, typename Load, typename Store>
__device__ inline void normalise_wide(int lane, int columns, float epsilon, Load load_column, Store store_column) {
  float sum = 0.0f;
  for (int column = lane; column < columns; column += Threads) {
    sum += load_column(column);
  }
  const float count = static_cast<float>(columns);
  const float mean = fast_divide(row_sum<Threads, 0>(sum), count);
  float squares = 0.0f;
  for (int column = lane; column < columns; column += Threads) {
    const float difference = load_column(column) - mean;
    squares += difference * difference;
  }
  const float scale = reciprocal_root(fast_divide(row_sum<Threads, 1>(squares), count) + epsilon);
  for (int column = lane; column < columns; column += Threads) {
    store_column(column, (load_column(column) - mean) * scale);
  }
}

// Threads of a row of any width.
constexpr int kWideThreads = 256;

template <int Threads_, int Groups_>
struct RowShape {
  static constexpr int Threads = Threads_;
  static constexpr int Groups = Groups_;
};

// Up to here a block a row, one vector a thread, is faster than a warp a row: the multiprocessors are not full, and what
// counts is how long one row takes.
constexpr int64_t kFewRows = 2048;

// Calls `launch_fast` with the RowShape that holds `columns` columns, or `launch_wide` if none does or the vector
// accesses are not allowed.
template <int Width, typename Fast, typename Wide>
void choose_row_shape(int64_t rows, int columns, bool vectors, Fast launch_fast, Wide launch_wide) {
  if (!vectors || columns > 3072) {
    launch_wide();
  } else if (columns <= 32 * Width) {
    launch_fast(RowShape<32, 1>{});
  } else if (columns <= 1024 && rows <= kFewRows) {
    launch_fast(RowShape<1024 / Width, 1>{});
  } else if (columns <= 1024) {
    launch_fast(RowShape<32, 32 / Width>{});
  } else {
    launch_fast(RowShape<128, 24 / Width>{});
  }
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether `load` may read here: the host reads element by element.
#ifdef JINACLIP_HOST
inline bool aligned_for_load(const void*) { return true; }
#else
inline bool aligned_for_load(const void* pointer) { return aligned(pointer); }
#endif

// The grid of a kernel with Threads threads a row. Warps of few rows are spread over the multiprocessors.
struct RowGrid {
  dim3 grid, block;
};

template <int Threads>
RowGrid row_grid(int64_t rows) {
  const unsigned in_block = Threads > kWarp || rows < 1024 ? 1 : 8;
  return {dim3(static_cast<unsigned>((rows + in_block - 1) / in_block)), dim3(Threads, in_block)};
}

__device__ inline int64_t row_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

}  // namespace jinaclip
