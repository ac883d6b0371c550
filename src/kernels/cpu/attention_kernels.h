// Causal attention in blocks that stay in the caches (Dao et al. 2022, "FlashAttention"): no [T, T] matrix is ever
// stored. Included by one file per instruction set.
//
// Scores are computed transposed, [keys, queries]: a query's maximum and sum run down a column, so that all lanes of a
// vector stand for queries of their own, and the weights come out as the operands of the next products need them.
// Lengths are padded with zeros to whole blocks. A padded key comes after every query, so causality hides it; a padded
// query has a gradient of zero and adds nothing.
#pragma once

#include "attention.h"
#include "product.h"

namespace {

using bbt::attention::Problem;
using bbt::attention::View;

// Keys whose scores backward computes at a time.
constexpr int kStrip = 8;

constexpr float kLog2E = 1.4426950408889634f;

// Hands out a scratch piece by piece; with a null one, only counts.
struct Scratch {
  explicit Scratch(void* base) : base(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

  char* base;
  size_t used = 0;
};

template <class Dtype, class Compute>
struct Attention {
  typedef typename Dtype::Element Element;

  explicit Attention(const Problem& problem)
      : problem(problem),
        length(problem.length),
        dim(static_cast<int>(problem.dim)),
        blocks((problem.length + kBlock - 1) / kBlock),
        padded((dim + kLanes * Compute::kPer - 1) / (kLanes * Compute::kPer) * (kLanes * Compute::kPer)),
        row_units(padded / Compute::kPer),
        block_units(kBlock * row_units),
        group(problem.heads / problem.kv_heads) {}

  // --- reading and writing the caller's tensors ---

  Element* row_of(const View& view, int64_t b, int64_t h, int64_t row) const {
    return static_cast<Element*>(view.data) + b * view.batch + h * view.head + row * view.row;
  }

  // Fetches the row that the next block has in this one's place: blocks are read in order, and the hardware does not
  // foresee rows that lie apart.
  void fetch_ahead(const View& view, int64_t b, int64_t h, int64_t row) const {
    if (row + kBlock >= length) return;
    const Element* next = row_of(view, b, h, row + kBlock);
    for (int i = 0; i < dim; i += 64 / sizeof(Element)) __builtin_prefetch(next + i);
  }

  // Rows of block `i`, zeros past the end.
  void pack_rows(const View& view, int64_t b, int64_t h, int64_t i, Unit* to) const {
    for (int r = 0; r < kBlock; ++r) {
      const int64_t row = i * kBlock + r;
      if (row < length) {
        fetch_ahead(view, b, h, row);
        Compute::template pack_row<Dtype>(row_of(view, b, h, row), dim, padded, to + r * row_units);
      } else {
        __builtin_memset(to + r * row_units, 0, sizeof(Unit) * row_units);
      }
    }
  }

  // Packed rows of a block, made the operand B of a product that sums over D: [row_units, kBlock].
  void pack_columns(const Unit* rows, Unit* to) const {
    for (int r = 0; r < kBlock; r += kLanes) {
      for (int c = 0; c < row_units; c += kLanes) {
        transpose(rows + r * row_units + c, row_units, to + c * kBlock + r, kBlock);
      }
    }
  }

  void write_row(const float* from, float factor, Element* to) const {
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) Dtype::store_row(to + i, load(from + i) * factor);
    if (i < dim) {
      Element rest[kLanes];
      Dtype::store_row(rest, load(from + i) * factor);
      __builtin_memcpy(to + i, rest, sizeof(Element) * (dim - i));
    }
  }

  void write_block(const float* from, float factor, const View& view, int64_t b, int64_t h, int64_t i) const {
    for (int64_t r = 0; r < kBlock && i * kBlock + r < length; ++r) {
      write_row(from + r * padded, factor, row_of(view, b, h, i * kBlock + r));
    }
  }

  // --- forward ---

  struct ForwardScratch {
    ForwardScratch(const Attention& a, void* base) : scratch(base) {
      k_rows = scratch.take<Unit>(a.blocks * a.block_units);
      v_rows = scratch.take<Unit>(a.block_units);
      v_pairs = scratch.take<Unit>(a.blocks * a.block_units);
      q_rows = scratch.take<Unit>(a.block_units);
      q_columns = scratch.take<Unit>(a.block_units);
      scores = scratch.take<float>(kBlock * kBlock);
      weights = scratch.take<Unit>(kBlock * kBlock / Compute::kPer);
      out = scratch.take<float>(kBlock * a.padded);
      largest = scratch.take<float>(kBlock);
      total = scratch.take<float>(kBlock);
      shrink = scratch.take<float>(kBlock);
    }

    Scratch scratch;
    // All keys and values of a head.
    Unit *k_rows, *v_rows, *v_pairs;
    // A block of queries.
    Unit *q_rows, *q_columns;
    // Of a block of keys and queries: [keys, queries].
    float* scores;
    Unit* weights;
    // Per query: the output so far, the largest score, the sum of the weights, what both shrink by.
    float *out, *largest, *total, *shrink;
  };

  void forward(int64_t begin, int64_t end, void* base) const {
    const ForwardScratch s(*this, base);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / problem.heads, h = task / blocks % problem.heads;
      // Early blocks see few keys, late ones many: in turn, so that equal shares of the tasks are equal work.
      const int64_t turn = task % blocks, i = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
      const int64_t kv = h / group;
      if (packed != b * problem.kv_heads + kv) {
        packed = b * problem.kv_heads + kv;
        for (int64_t j = 0; j < blocks; ++j) {
          pack_rows(problem.k, b, kv, j, s.k_rows + j * block_units);
          pack_rows(problem.v, b, kv, j, s.v_rows);
          Compute::pack_pairs(s.v_rows, padded, s.v_pairs + j * block_units);
        }
      }
      forward_block(s, b, h, i);
    }
  }

  void forward_block(const ForwardScratch& s, int64_t b, int64_t h, int64_t i) const {
    pack_rows(problem.q, b, h, i, s.q_rows);
    pack_columns(s.q_rows, s.q_columns);
    for (int r = 0; r < kBlock; ++r) {
      s.largest[r] = -__builtin_inff();
      s.total[r] = 0;
    }
    __builtin_memset(s.out, 0, sizeof(float) * kBlock * padded);
    for (int64_t j = 0; j < i; ++j) forward_tile<false>(s, j);
    forward_tile<true>(s, i);

    for (int64_t r = 0; r < kBlock && i * kBlock + r < length; ++r) {
      const int64_t row = i * kBlock + r;
      write_row(s.out + r * padded, 1 / s.total[r], row_of(problem.out, b, h, row));
      const float log_total = __builtin_log2f(s.total[r]) / (problem.scale * kLog2E);
      problem.lse[(b * problem.heads + h) * length + row] = s.largest[r] + log_total;
    }
  }

  // Adds what one block of keys contributes. kDiagonal: it is that of the queries themselves.
  template <bool kDiagonal>
  void forward_tile(const ForwardScratch& s, int64_t j) const {
    const float factor = problem.scale * kLog2E;
    const Unit* k_rows = s.k_rows + j * block_units;
    if constexpr (kDiagonal) {
      // The first queries do not see the last keys.
      multiply<Compute, Order::kRows, Sum::kAll, false>(k_rows, row_units, s.q_columns, kBlock, s.scores, kBlock,
                                                        kSide, kBlock, padded);
      multiply<Compute, Order::kRows, Sum::kAll, false>(k_rows + kSide * row_units, row_units, s.q_columns + kSide,
                                                        kBlock, s.scores + kSide * kBlock + kSide, kBlock, kSide,
                                                        kBlock - kSide, padded);
    } else {
      multiply<Compute, Order::kRows, Sum::kAll, false>(k_rows, row_units, s.q_columns, kBlock, s.scores, kBlock,
                                                        kBlock, kBlock, padded);
    }

    bool shrinks = false;
    for (int query = 0; query < kBlock; query += kSide) {
      const int keys = kDiagonal ? query + kSide : kBlock;
      Vec largest[kSideVecs];
      for (int v = 0; v < kSideVecs; ++v) largest[v] = load(s.largest + query + v * kLanes);
      for (int key = 0; key < keys; ++key) {
        float* row = s.scores + key * kBlock + query;
        for (int v = 0; v < kSideVecs; ++v) {
          Vec score = load(row + v * kLanes);
          if constexpr (kDiagonal) {
            score = iota() + (query + v * kLanes) < key ? broadcast(-__builtin_inff()) : score;
            store(row + v * kLanes, score);
          }
          largest[v] = larger(score, largest[v]);
        }
      }
      Vec total[kSideVecs];
      for (int v = 0; v < kSideVecs; ++v) {
        const int at = query + v * kLanes;
        const Vec shrink = exp2_of_negative((load(s.largest + at) - largest[v]) * factor);
        for (int lane = 0; lane < kLanes; ++lane) shrinks |= shrink[lane] != 1;
        store(s.shrink + at, shrink);
        store(s.largest + at, largest[v]);
        total[v] = load(s.total + at) * shrink;
      }
      for (int key = 0; key < keys; key += 2) {
        Vec weights[2][kSideVecs];
        for (int r = 0; r < 2; ++r) {
          for (int v = 0; v < kSideVecs; ++v) {
            const Vec score = load(s.scores + (key + r) * kBlock + query + v * kLanes);
            // Not a fused multiply-subtract: the largest score gives 0 whatever its size.
            weights[r][v] = exp2_of_negative((score - largest[v]) * factor);
            total[v] += weights[r][v];
          }
        }
        Compute::store_columns(s.weights, key, query, weights);
      }
      for (int v = 0; v < kSideVecs; ++v) store(s.total + query + v * kLanes, total[v]);
    }

    if (shrinks) {
      for (int r = 0; r < kBlock; ++r) {
        for (int c = 0; c < padded; c += kLanes) {
          store(s.out + r * padded + c, load(s.out + r * padded + c) * s.shrink[r]);
        }
      }
    }
    constexpr Sum kSum = kDiagonal ? Sum::kUpToRow : Sum::kAll;
    multiply<Compute, Order::kColumns, kSum, true>(s.weights, kBlock, s.v_pairs + j * block_units, padded, s.out,
                                                   padded, kBlock, padded, kBlock);
  }

  // --- backward ---

  int64_t partial_size() const { return blocks * kBlock * padded; }

  struct BackwardScratch {
    BackwardScratch(const Attention& a, void* base) : scratch(base) {
      const int64_t units = a.blocks * a.block_units;
      const bool pairs = Compute::kPer > 1;
      rows = scratch.take<Unit>(a.block_units);
      k_rows = scratch.take<Unit>(units);
      k_pairs = pairs ? scratch.take<Unit>(units) : k_rows;
      v_rows = scratch.take<Unit>(units);
      q_columns = scratch.take<Unit>(units);
      q_pairs = scratch.take<Unit>(units);
      dout_columns = scratch.take<Unit>(units);
      dout_pairs = scratch.take<Unit>(units);
      lse = scratch.take<float>(a.blocks * kBlock);
      delta = scratch.take<float>(a.blocks * kBlock);
      dq = scratch.take<float>(a.problem.splits == 1 ? a.partial_size() : 0);
      dk = scratch.take<float>(a.partial_size());
      dv = scratch.take<float>(a.partial_size());
      scores = scratch.take<float>(kStrip * kBlock);
      dweights = scratch.take<float>(kStrip * kBlock);
      weights_rows = scratch.take<Unit>(kBlock * kBlock / Compute::kPer);
      dscores_rows = scratch.take<Unit>(kBlock * kBlock / Compute::kPer);
      dscores_columns = pairs ? scratch.take<Unit>(kBlock * kBlock / Compute::kPer) : dscores_rows;
    }

    Scratch scratch;
    Unit* rows;
    // A head's keys and values, queries and output gradients, as operands.
    Unit *k_rows, *k_pairs, *v_rows, *q_columns, *q_pairs, *dout_columns, *dout_pairs;
    // Per query, see Problem; and the sum over D of out * dout.
    float *lse, *delta;
    float *dq, *dk, *dv;
    // Of kStrip keys and a block of queries.
    float *scores, *dweights;
    // Of a block of keys and queries.
    Unit *weights_rows, *dscores_rows, *dscores_columns;
  };

  void backward(int64_t begin, int64_t end, void* base) const {
    BackwardScratch s(*this, base);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % problem.splits, head = task / problem.splits;
      backward_task(s, head / problem.kv_heads, head % problem.kv_heads, split);
    }
  }

  // The gradients of every problem.splits-th block of keys and values of one head.
  void backward_task(BackwardScratch& s, int64_t b, int64_t kv, int64_t split) const {
    const int64_t block_floats = kBlock * padded;
    for (int64_t j = split; j < blocks; j += problem.splits) {
      pack_rows(problem.k, b, kv, j, s.k_rows + j * block_units);
      Compute::pack_pairs(s.k_rows + j * block_units, padded, s.k_pairs + j * block_units);
      pack_rows(problem.v, b, kv, j, s.v_rows + j * block_units);
      __builtin_memset(s.dk + j * block_floats, 0, sizeof(float) * block_floats);
      __builtin_memset(s.dv + j * block_floats, 0, sizeof(float) * block_floats);
    }
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      for (int64_t i = split; i < blocks; ++i) pack_queries(s, b, h, i);
      if (problem.splits > 1) {
        s.dq = problem.partial + ((split * problem.batch + b) * problem.heads + h) * partial_size();
      }
      __builtin_memset(s.dq, 0, sizeof(float) * partial_size());
      for (int64_t j = split; j < blocks; j += problem.splits) {
        backward_tile<true>(s, j, j);
        for (int64_t i = j + 1; i < blocks; ++i) backward_tile<false>(s, i, j);
      }
      if (problem.splits > 1) continue;
      for (int64_t i = 0; i < blocks; ++i) {
        write_block(s.dq + i * block_floats, problem.scale, problem.dq, b, h, i);
      }
    }
    for (int64_t j = split; j < blocks; j += problem.splits) {
      write_block(s.dk + j * block_floats, problem.scale, problem.dk, b, kv, j);
      write_block(s.dv + j * block_floats, 1, problem.dv, b, kv, j);
    }
  }

  void pack_queries(const BackwardScratch& s, int64_t b, int64_t h, int64_t i) const {
    pack_rows(problem.q, b, h, i, s.rows);
    pack_columns(s.rows, s.q_columns + i * block_units);
    Compute::pack_pairs(s.rows, padded, s.q_pairs + i * block_units);
    pack_rows(problem.dout, b, h, i, s.rows);
    pack_columns(s.rows, s.dout_columns + i * block_units);
    Compute::pack_pairs(s.rows, padded, s.dout_pairs + i * block_units);
    for (int64_t r = 0; r < kBlock; ++r) {
      const int64_t row = i * kBlock + r;
      const bool inside = row < length;
      if (inside) fetch_ahead(problem.out, b, h, row);
      s.lse[row] = inside ? problem.lse[(b * problem.heads + h) * length + row] : 0;
      s.delta[row] = inside ? dot(row_of(problem.out, b, h, row), row_of(problem.dout, b, h, row)) : 0;
    }
  }

  float dot(const Element* x, const Element* y) const {
    Vec total = {};
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) total += Dtype::load_row(x + i) * Dtype::load_row(y + i);
    float rest = 0;
    for (; i < dim; ++i) rest += Dtype::to_float(x[i]) * Dtype::to_float(y[i]);
    return sum(total) + rest;
  }

  template <bool kDiagonal>
  void backward_tile(const BackwardScratch& s, int64_t i, int64_t j) const {
    for (int key = 0; key < kBlock; key += kStrip) {
      // The first queries do not see the last keys.
      const int query = kDiagonal ? key / kSide * kSide : 0;
      const int64_t k_row = j * block_units + key * row_units, q_column = i * block_units + query;
      multiply<Compute, Order::kRows, Sum::kAll, false>(s.k_rows + k_row, row_units, s.q_columns + q_column, kBlock,
                                                        s.scores + query, kBlock, kStrip, kBlock - query, padded);
      multiply<Compute, Order::kRows, Sum::kAll, false>(s.v_rows + k_row, row_units, s.dout_columns + q_column, kBlock,
                                                        s.dweights + query, kBlock, kStrip, kBlock - query, padded);
      for (int side = query; side < kBlock; side += kSide) backward_strip<kDiagonal>(s, i, key, side);
    }
    constexpr Sum kOverQueries = kDiagonal ? Sum::kFromRow : Sum::kAll;
    constexpr Sum kOverKeys = kDiagonal ? Sum::kUpToRow : Sum::kAll;
    const int64_t i_units = i * block_units, j_units = j * block_units;
    const int64_t i_floats = i * kBlock * padded, j_floats = j * kBlock * padded;
    multiply<Compute, Order::kRows, kOverQueries, true>(s.weights_rows, kBlock / Compute::kPer, s.dout_pairs + i_units,
                                                        padded, s.dv + j_floats, padded, kBlock, padded, kBlock);
    multiply<Compute, Order::kRows, kOverQueries, true>(s.dscores_rows, kBlock / Compute::kPer, s.q_pairs + i_units,
                                                        padded, s.dk + j_floats, padded, kBlock, padded, kBlock);
    multiply<Compute, Order::kColumns, kOverKeys, true>(s.dscores_columns, kBlock, s.k_pairs + j_units, padded,
                                                        s.dq + i_floats, padded, kBlock, padded, kBlock);
  }

  // The weights of kStrip keys for kSide queries, and the gradient of their scores.
  template <bool kDiagonal>
  void backward_strip(const BackwardScratch& s, int64_t i, int first_key, int query) const {
    const float factor = problem.scale * kLog2E;
    Vec lse[kSideVecs], delta[kSideVecs];
    for (int v = 0; v < kSideVecs; ++v) {
      lse[v] = load(s.lse + i * kBlock + query + v * kLanes);
      delta[v] = load(s.delta + i * kBlock + query + v * kLanes);
    }
    for (int key = 0; key < kStrip; key += 2) {
      Vec weights[2][kSideVecs], dscores[2][kSideVecs];
      for (int r = 0; r < 2; ++r) {
        for (int v = 0; v < kSideVecs; ++v) {
          const int at = (key + r) * kBlock + query + v * kLanes;
          Vec weight = exp2_of_negative((load(s.scores + at) - lse[v]) * factor);
          if constexpr (kDiagonal) {
            weight = iota() + (query + v * kLanes) < first_key + key + r ? Vec{} : weight;
          }
          weights[r][v] = weight;
          dscores[r][v] = weight * (load(s.dweights + at) - delta[v]);
        }
      }
      Compute::store_rows(s.weights_rows, first_key + key, query, weights);
      Compute::store_rows(s.dscores_rows, first_key + key, query, dscores);
      if constexpr (Compute::kPer > 1) Compute::store_columns(s.dscores_columns, first_key + key, query, dscores);
    }
  }

  void reduce(int64_t begin, int64_t end) const {
    const int64_t heads = problem.batch * problem.heads;
    for (int64_t head = begin; head < end; ++head) {
      float* first = problem.partial + head * partial_size();
      for (int64_t split = 1; split < problem.splits; ++split) {
        const float* other = problem.partial + (split * heads + head) * partial_size();
        for (int64_t at = 0; at < partial_size(); at += kLanes) store(first + at, load(first + at) + load(other + at));
      }
      for (int64_t i = 0; i < blocks; ++i) {
        write_block(first + i * kBlock * padded, problem.scale, problem.dq, head / problem.heads,
                    head % problem.heads, i);
      }
    }
  }

  const Problem& problem;
  const int64_t length;
  const int dim;
  // Blocks of queries, and of keys.
  const int64_t blocks;
  // D with the padding that whole vectors need; its units; those of a block.
  const int padded, row_units;
  const int64_t block_units;
  // Query heads that share keys and values.
  const int64_t group;
};

template <class Dtype, class Compute>
constexpr bbt::attention::Kernels kernels(const char* name) {
  typedef Attention<Dtype, Compute> A;
  return {
      .name = name,
      .needs = compiled_for(),
      .forward_tasks = [](const Problem& p) { return p.batch * p.heads * A(p).blocks; },
      .forward_scratch = [](const Problem& p) { return typename A::ForwardScratch(A(p), nullptr).scratch.used; },
      .forward = [](const Problem& p, int64_t begin, int64_t end, void* scratch) { A(p).forward(begin, end, scratch); },
      .backward_scratch = [](const Problem& p) { return typename A::BackwardScratch(A(p), nullptr).scratch.used; },
      .backward = [](const Problem& p, int64_t begin, int64_t end,
                     void* scratch) { A(p).backward(begin, end, scratch); },
      .partial_size = [](const Problem& p) { return A(p).partial_size(); },
      .reduce = [](const Problem& p, int64_t begin, int64_t end) { A(p).reduce(begin, end); },
  };
}

}  // namespace
