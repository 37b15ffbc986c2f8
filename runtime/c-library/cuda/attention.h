// What the attention kernels share: arguments, which text and query tile a block computes, rotary positions, the
// softmax over key tiles, and loading queries and storing outputs.
//
// Symbols: N rows (tokens), H heads of 64 columns, D = 64 H columns, B texts (or images).
#pragma once

#include <cfloat>

#include "operators.h"
#include "rows.h"
#include "tensor_core.h"

namespace jinaclip {

struct AttentionArguments {
  const __half* qkv;         // [N, 3D]
  const __half* keys;        // [N, D], rotated; not read by the kernel for short texts
  const float *cos, *sin;    // [table_rows, 32]
  const int32_t* positions;  // [N], or null: the index in the text
  const int32_t* offsets;    // [B + 1], where each text begins, and their end; null: every text has `length` rows
  __half* y;                 // [N, D]
  int64_t rows, length;
  int texts, heads, table_rows;
  int more_than, at_most;  // the launch computes texts with more_than < length <= at_most
};

// Part of a text that a block computes: queries first to first + Tile - 1 of a text at rows begin to begin + length
// - 1.
struct TextTile {
  int begin, length, first;
};

__device__ inline int clamped_offset(const AttentionArguments& a, int text) {
  const int offset = a.offsets[text];
  return offset < 0 ? 0 : offset > a.rows ? static_cast<int>(a.rows) : offset;
}

__device__ inline bool length_in_range(const AttentionArguments& a, const TextTile& tile) {
  return tile.length > a.more_than && tile.length <= a.at_most;
}

// A whole text. False: it is empty, or its length is not in range.
__device__ inline bool find_text(const AttentionArguments& a, int text, TextTile& tile) {
  tile.begin = a.offsets != nullptr ? clamped_offset(a, text) : static_cast<int>(text * a.length);
  tile.length = a.offsets != nullptr ? clamped_offset(a, text + 1) - tile.begin : static_cast<int>(a.length);
  tile.first = 0;
  return tile.length > 0 && length_in_range(a, tile);
}

// Tiles of Tile queries are numbered so that text b has those from offsets[b] / Tile + b on: at least as many as it
// needs, and no block has to add up lengths.
template <int Tile>
__host__ __device__ inline int64_t tile_count(const AttentionArguments& a) {
  return a.offsets != nullptr ? a.rows / Tile + a.texts : a.texts * ((a.length + Tile - 1) / Tile);
}

// Called by whole warps. False: there is no such tile, or its text's length is not in range.
template <int Tile>
__device__ inline bool find_tile(const AttentionArguments& a, int64_t number, TextTile& tile) {
  int64_t first;
  if (a.offsets == nullptr) {
    const int64_t tiles = (a.length + Tile - 1) / Tile;
    tile.begin = static_cast<int>(number / tiles * a.length);
    tile.length = static_cast<int>(a.length);
    first = number % tiles * Tile;
  } else {
    // The last text whose tiles begin at or before `number`: 32 probes at a time.
    const int lane = threadIdx.x % kWarp;
    int low = 0, high = a.texts;
    while (high - low > 1) {
      const int step = (high - low + kWarp - 1) / kWarp;
      const int probe = low + lane * step;
      const bool before = probe < high && a.offsets[probe] / Tile + probe <= number;
      const int count = __popc(__ballot_sync(0xffffffffu, before));
      low += (count > 0 ? count - 1 : 0) * step;
      high = low + step < high ? low + step : high;
      if (step == 1) {
        break;
      }
    }
    tile.begin = clamped_offset(a, low);
    tile.length = clamped_offset(a, low + 1) - tile.begin;
    first = (number - (a.offsets[low] / Tile + low)) * Tile;
  }
  tile.first = static_cast<int>(first);
  return first >= 0 && first < tile.length && length_in_range(a, tile);
}

__device__ inline int position_of(const AttentionArguments& a, const TextTile& tile, int row) {
  return a.positions != nullptr ? a.positions[tile.begin + row] : row;
}

// Count neighbouring values of a row of cos or sin; NaN for positions that the table does not have.
template <int Count>
__device__ inline void load_angles(const float* table, const AttentionArguments& a, int position, int pair,
                                   float (&values)[Count]) {
  const bool known = position >= 0 && position < a.table_rows;
  load(table + int64_t{1} * (known ? position : 0) * (kHeadColumns / 2) + pair, values);
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    values[i] = known ? values[i] : NAN;
  }
}

// (a, b) rotated by an angle.
__device__ inline void rotate(float cos, float sin, float& a, float& b) {
  const float x = a, y = b;
  a = x * cos - y * sin;
  b = x * sin + y * cos;
}

// The two 8-column chunks of a row that thread `part` of 4 rotates: their pairs have the angles 8 * part to 8 * part
// + 7.
template <bool Interleaved>
__device__ inline int chunk_of(int part, int i) {
  return Interleaved ? 2 * part + i : part + 4 * i;
}

struct Angles {
  float cos[8], sin[8];

  __device__ void read(const AttentionArguments& a, int position, int part) {
    load_angles(a.cos, a, position, 8 * part, cos);
    load_angles(a.sin, a, position, 8 * part, sin);
  }
};

template <bool Interleaved>
__device__ inline void rotate_chunks(const Angles& angles, uint4 (&chunks)[2]) {
  uint32_t words[2][4] = {{chunks[0].x, chunks[0].y, chunks[0].z, chunks[0].w},
                          {chunks[1].x, chunks[1].y, chunks[1].z, chunks[1].w}};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (Interleaved) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x, y;
        unpack_halves(words[j][w], x, y);
        rotate(angles.cos[4 * j + w], angles.sin[4 * j + w], x, y);
        words[j][w] = pack_halves(x, y);
      }
    } else {
      float x[2], y[2];
      unpack_halves(words[0][w], x[0], x[1]);
      unpack_halves(words[1][w], y[0], y[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rotate(angles.cos[2 * w + j], angles.sin[2 * w + j], x[j], y[j]);
      }
      words[0][w] = pack_halves(x[0], x[1]);
      words[1][w] = pack_halves(y[0], y[1]);
    }
  }
  chunks[0] = {words[0][0], words[0][1], words[0][2], words[0][3]};
  chunks[1] = {words[1][0], words[1][1], words[1][2], words[1][3]};
}

// Score times this, 1 / sqrt(64) to the base two, is an exponent.
constexpr float kScoreScale = 1.4426950408889634f / 8.0f;

// Softmax over key tiles, for the two rows of a lane's C fragments; `sums` are of this lane's columns. Exponents are
// relative to `reference_max`: a row's maximum, or an earlier one that is at most kSlack (base 2) smaller. Within the
// slack outputs and sums are not rescaled; weights of up to 2^kSlack keep float16's relative precision.
struct RunningSoftmax {
  static constexpr float kSlack = 8.0f;  // of an exponent of two
  static constexpr int kChains = 4;
  static constexpr float kLargeExponent = 1 << 20;  // above this the rounding of a shift in float32 changes weights
  float reference_max[2] = {-FLT_MAX, -FLT_MAX}, sums[2] = {0.0f, 0.0f};

  // Scores become their exponentials. Returns, the same in all lanes, whether earlier outputs have to be multiplied
  // with `scales`, as the sums were.
  template <int Groups>
  __device__ bool update(float (&scores)[Groups][4], float (&scales)[2]) {
    float row_max[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float partial[kChains];  // independent, so that none waits for the one before
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        partial[c] = scores[c / 2][2 * i + c % 2];
      }
#pragma unroll
      for (int g = kChains / 2; g < Groups; ++g) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& chain = partial[(2 * g + j) % kChains];
          chain = fmaxf(chain, scores[g][2 * i + j]);
        }
      }
      row_max[i] = fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[2], partial[3]));
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row_max[i] = fmaxf(row_max[i], __shfl_xor_sync(0xffffffffu, row_max[i], distance));
      }
    }
    const bool within = (row_max[0] - reference_max[0]) * kScoreScale <= kSlack &&
                        (row_max[1] - reference_max[1]) * kScoreScale <= kSlack;
    const bool rescaled = __ballot_sync(0xffffffffu, !within) != 0;
    if (rescaled) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row_max[i] = fmaxf(row_max[i], reference_max[i]);
        scales[i] = fast_exp2((reference_max[i] - row_max[i]) * kScoreScale);
        reference_max[i] = row_max[i];
        sums[i] *= scales[i];
      }
    }
    const float shifts[2] = {reference_max[0] * kScoreScale, reference_max[1] * kScoreScale};
    float factor = kScoreScale;
    if (__ballot_sync(0xffffffffu, fmaxf(fabsf(shifts[0]), fabsf(shifts[1])) > kLargeExponent) != 0) {
      // A shift's rounding would be an exponent of its own: products are rounded in the same way.
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          scores[g][j] = multiply_rounded(scores[g][j], kScoreScale);
        }
      }
      factor = 1.0f;
    }
    float partial[2][kChains] = {};
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = j / 2;
        scores[g][j] = fast_exp2(fmaf(scores[g][j], factor, -shifts[row]));
        partial[row][(2 * g + j) % kChains] += scores[g][j];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] += (partial[i][0] + partial[i][1]) + (partial[i][2] + partial[i][3]);
    }
    return rescaled;
  }

  // Of a whole row, once all keys have come.
  __device__ float reciprocal_sum(int i) const {
    float sum = sums[i];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    return 1.0f / sum;
  }
};

// Scores of keys from `valid_keys` of a tile on become -inf.
template <int Groups>
__device__ inline void mask_scores(float (&scores)[Groups][4], int valid_keys) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (8 * g + lane % 4 * 2 + j % 2 >= valid_keys) {
        scores[g][j] = -INFINITY;
      }
    }
  }
}

// Queries row to row + 15 of a text's head, rotated, into 16 rows of a tile, by one warp. Those beyond the text become
// zero.
template <bool Interleaved>
__device__ inline void load_queries(const AttentionArguments& a, const TextTile& tile, int head, int row, __half* to) {
  const int lane = threadIdx.x % kWarp, part = lane % 4;
  const int columns = a.heads * kHeadColumns;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in_tile = lane / 4 + 8 * i, own = row + in_tile;
    uint4 chunks[2] = {};
    if (own < tile.length) {
      const __half* from = a.qkv + int64_t{3} * (tile.begin + own) * columns + head * kHeadColumns;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        chunks[j] = *reinterpret_cast<const uint4*>(from + 8 * chunk_of<Interleaved>(part, j));
      }
      Angles angles;
      angles.read(a, position_of(a, tile, own), part);
      rotate_chunks<Interleaved>(angles, chunks);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      *reinterpret_cast<uint4*>(to + tile_at(in_tile, chunk_of<Interleaved>(part, j))) = chunks[j];
    }
  }
}

// Outputs [16, 64] of queries row to row + 15 as C fragments, divided by the rows' sums, by way of 16 rows of shared
// memory that only this warp uses.
__device__ inline void store_outputs(const AttentionArguments& a, const TextTile& tile, int head, int row,
                                     const RunningSoftmax& softmax, const float (&outputs)[8][4], __half* staging) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // other lanes may have read queries from `staging`
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float factor = softmax.reciprocal_sum(i);
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      *reinterpret_cast<uint32_t*>(staging + tile_at(lane / 4 + 8 * i, g) + lane % 4 * 2) =
          pack_halves(outputs[g][2 * i] * factor, outputs[g][2 * i + 1] * factor);
    }
  }
  __syncwarp();
  __half* to = a.y + int64_t{1} * (tile.begin + row) * a.heads * kHeadColumns + head * kHeadColumns;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int in_tile = lane / 8 + 4 * i, chunk = lane % 8;
    if (row + in_tile < tile.length) {
      *reinterpret_cast<uint4*>(to + in_tile * a.heads * kHeadColumns + 8 * chunk) =
          *reinterpret_cast<const uint4*>(staging + tile_at(in_tile, chunk));
    }
  }
  __syncwarp();
}

// A tile's weights, C fragments, as A fragments of float16.
template <int Groups>
__device__ inline void round_weights(const float (&scores)[Groups][4], uint32_t (&weights)[Groups / 2][4]) {
#pragma unroll
  for (int k = 0; k < Groups / 2; ++k) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float (&pair)[4] = scores[2 * k + w / 2];
      weights[k][w] = pack_halves(pair[w % 2 * 2], pair[w % 2 * 2 + 1]);
    }
  }
}

__device__ inline void rescale(float (&outputs)[8][4], const float (&scales)[2]) {
#pragma unroll
  for (int g = 0; g < 8; ++g) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      outputs[g][j] *= scales[j / 2];
    }
  }
}

// With Hopper's warpgroup products; only where hopper_attention_runs().
void hopper_attention(const AttentionArguments& arguments, bool interleaved, Stream stream);

}  // namespace jinaclip
