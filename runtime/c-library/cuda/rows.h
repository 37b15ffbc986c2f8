// Rows held in registers: vector loads and stores, sums over a row, and its normalisation.
//
// A row of C columns is handled by Threads threads (one warp, or one block of more). Thread `lane` holds Groups groups
// of Width neighbouring columns; group g begins at column (g * Threads + lane) * Width, so that the loads of a warp are
// contiguous. Everything is computed in float32.
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
  const Pack<T, Width> pack = *reinterpret_cast<const Pack<T, Width>*>(from);
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    values[i] = to_float(pack.items[i]);
  }
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
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if constexpr (Threads > kWarp) {
    __shared__ float of_warps[Threads / kWarp];
    if (threadIdx.x % kWarp == 0) {
      of_warps[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Threads / kWarp; ++warp) {
      value += of_warps[warp];
    }
  }
  return value;
}

// Subtracts the mean of a row and divides by sqrt(variance + epsilon). Values at columns from `columns` on are zero
// before, and without meaning after.
template <int Threads, int Groups, int Width>
__device__ inline void normalise(float (&values)[Groups][Width], int lane, int columns, float epsilon) {
  float sum = 0.0f;
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      sum += values[g][i];
    }
  }
  const float count = static_cast<float>(columns);
  const float mean = fast_divide(row_sum<Threads, 0>(sum), count);
  float squares = 0.0f;
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * Width;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[g][i] -= mean;
      squares += column + i < columns ? values[g][i] * values[g][i] : 0.0f;
    }
  }
  const float scale = reciprocal_root(fast_divide(row_sum<Threads, 1>(squares), count) + epsilon);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[g][i] *= scale;
    }
  }
}

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

// Calls `launch_fast` with the RowShape that holds `columns` columns, or `launch_wide` if none does or the vector
// accesses are not allowed.
template <int Width, typename Fast, typename Wide>
void choose_row_shape(int columns, bool vectors, Fast launch_fast, Wide launch_wide) {
  if (!vectors || columns > 3072) {
    launch_wide();
  } else if (columns <= 32 * Width) {
    launch_fast(RowShape<32, 1>{});
  } else if (columns <= 1024) {
    launch_fast(RowShape<32, 32 / Width>{});
  } else {
    launch_fast(RowShape<128, 24 / Width>{});
  }
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

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
