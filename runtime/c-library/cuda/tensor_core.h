// Matrix products of a warp on the tensor cores, and what moves their operands: PTX on a GPU, loops over exchanged
// values on the host.
//
// A fragment is a matrix held by the 32 lanes of a warp. With r = lane / 4 and c = 2 * (lane % 4):
//   A [16, 16] float16: words (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8); a word is two neighbouring columns
//   B [16, 8] float16:  words of rows (c, c + 1) and (c + 8, c + 9), in column r
//   C [16, 8] float32:  (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)
#pragma once

#include "device.h"

namespace jinaclip {

// Rows of 64 float16 in shared memory. Their eight 16-byte chunks are permuted by the row (the 128-byte swizzle of
// Hopper's copy engine), so that eight rows of one column lie in different banks.
constexpr int kTileColumns = 64;

__device__ inline int tile_at(int row, int chunk) { return row * kTileColumns + ((chunk ^ (row & 7)) << 3); }

// What a launch has to ask for beyond the memory it needs: dynamic_shared_memory() begins at a multiple of this, eight
// such rows.
constexpr size_t kSharedAlignment = 1024;

#ifdef JINACLIP_HOST

inline uint32_t pack_halves(float low, float high) {
  const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t word;
  std::memcpy(&word, both, sizeof word);
  return word;
}

inline void unpack_halves(uint32_t word, float& low, float& high) {
  _Float16 both[2];
  std::memcpy(both, &word, sizeof word);
  low = static_cast<float>(both[0]);
  high = static_cast<float>(both[1]);
}

// Four matrices of 8 x 8; lane i gives the address of row i % 8 of matrix i / 8.
template <bool Transposed>
void load_matrices(const __half* row, uint32_t (&words)[4]) {
  const host_shim::Exchange<const __half*> rows(row);
  const unsigned r = host_shim::lane() / 4, c = host_shim::lane() % 4 * 2;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto at = [&](unsigned i, unsigned j) { return __half2float(rows[matrix * 8 + i][j]); };
    words[matrix] = Transposed ? pack_halves(at(c, r), at(c + 1, r)) : pack_halves(at(r, c), at(r, c + 1));
  }
}

struct WordsOfA {
  uint32_t words[4];
};

// Row `row` of A from the lanes that hold it.
inline void row_of_a(const host_shim::Exchange<WordsOfA>& a, unsigned row, float (&values)[16]) {
  for (unsigned column = 0; column < 16; column += 2) {
    const unsigned word = row / 8 + column / 8 * 2;
    unpack_halves(a[row % 8 * 4 + column % 8 / 2].words[word], values[column], values[column + 1]);
  }
}

// c += a b
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const host_shim::Exchange<WordsOfA> of_a({a[0], a[1], a[2], a[3]});
  float rows[2][16];
  row_of_a(of_a, host_shim::lane() / 4, rows[0]);
  row_of_a(of_a, host_shim::lane() / 4 + 8, rows[1]);
  struct WordsOfB {
    uint32_t words[2];
  };
  const host_shim::Exchange<WordsOfB> of_b({b0, b1});
  for (unsigned j = 0; j < 2; ++j) {
    const unsigned column = host_shim::lane() % 4 * 2 + j;
    for (unsigned k = 0; k < 16; k += 2) {
      float first, second;
      unpack_halves(of_b[column * 4 + k % 8 / 2].words[k / 8], first, second);
      for (unsigned i = 0; i < 2; ++i) {
        c[2 * i + j] += rows[i][k] * first + rows[i][k + 1] * second;
      }
    }
  }
}

inline void* dynamic_shared_memory() {
  static thread_local std::vector<unsigned char> memory(256 * 1024 + kSharedAlignment);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kSharedAlignment - begin % kSharedAlignment);
}

inline void copy_16_bytes(__half* to, const __half* from, bool inside) {
  inside ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
}
inline void commit_copies() {}
template <int Most>
void wait_for_copies() {}

#else

__device__ inline uint32_t pack_halves(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ inline void unpack_halves(uint32_t word, float& low, float& high) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  low = both.x;
  high = both.y;
}

template <bool Transposed>
__device__ inline void load_matrices(const __half* row, uint32_t (&words)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void* dynamic_shared_memory() {
  extern __shared__ unsigned char memory[];
  const uint32_t begin = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  return memory + (kSharedAlignment - begin % kSharedAlignment) % kSharedAlignment;
}

// Copies to shared memory that go on while the thread does other work; zeros, if not `inside`.
__device__ inline void copy_16_bytes(__half* to, const __half* from, bool inside) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
      : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most so many of this thread's groups of copies are under way.
template <int Most>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Most) : "memory");
}

#endif

}  // namespace jinaclip
