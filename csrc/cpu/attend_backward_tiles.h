// The products of the backward pass in bfloat16, on matrix tiles. Sums stay float32; weights and d logit are
// rounded to bfloat16 before they are multiplied again.
#pragma once

#include "common/plan.h"
#include "cpu/attend_tile.h"

namespace resona::cpu {

class TileBackward {
 public:
  TileBackward(const Shape& s, const AttendPlan& plan)
      : kernel_(*kernel_set().tiles), scope_(kernel_), head_dim_(s.head_dim), dim_(padded_brick(s.head_dim)) {
    const int64_t keys = padded_brick(plan.key_tile), rows = padded_brick(plan.row_tile);
    for (Buffer<uint16_t>* operand : {&key_, &value_, &key_columns_, &value_columns_})
      *operand = Buffer<uint16_t>(keys * dim_);
    for (Buffer<uint16_t>* operand : {&query_, &out_gradient_, &packed_query_, &packed_out_gradient_})
      *operand = Buffer<uint16_t>(rows * dim_);
    for (Buffer<uint16_t>* operand : {&weight_, &logit_gradient_}) *operand = Buffer<uint16_t>(rows * keys);
    for (Buffer<float>* product : {&product_, &gradient_product_}) *product = Buffer<float>(rows * keys);
  }

  void load_rows(const RowTile& tile, const Rows& query, const Rows& out_gradient) {
    gather(tile, query, query_.data());
    gather(tile, out_gradient, out_gradient_.data());
  }

  // For d query.
  void load_keys(const TileRows& key, const TileRows& value) {
    kernel_.pack_transposed(key, key_columns_.data());
    kernel_.pack_transposed(value, value_columns_.data());
    kernel_.pack_rows(key, key_.data());
  }

  // <query, key> and <d out, value>, [rows, stride].
  void multiply_rows(int64_t rows, int64_t keys, int64_t stride, float* product, float* gradient) {
    const int64_t m = padded_tile(rows), n = padded_tile(keys);
    kernel_.gemm({m, n, dim_, query_.data(), dim_, key_columns_.data(), product, stride, false});
    kernel_.gemm({m, n, dim_, out_gradient_.data(), dim_, value_columns_.data(), gradient, stride, false});
  }

  // d logit times keys, [rows, dim].
  void query_gradient(const float* logit_gradient, int64_t rows, int64_t keys, int64_t stride, float* to) {
    const int64_t depth = padded_brick(keys);
    for (int64_t i = 0; i < rows; ++i) {
      uint16_t* row = logit_gradient_.data() + i * depth;
      kernels<float>().store_row(DType::kBFloat16, logit_gradient + i * stride, row, keys);
      std::fill(row + keys, row + depth, uint16_t{0});
    }
    kernel_.gemm(
        {padded_tile(rows), dim_, depth, logit_gradient_.data(), depth, key_.data(), to, dim_, false});
  }

  // For d key and d value: keys are the rows of these products, and queries their columns.
  void load_keys_as_rows(const TileRows& key, const TileRows& value) {
    copy(key, key_.data());
    copy(value, value_.data());
  }

  // Adds weight^T d out and d logit^T query; row_values are [row_tile].
  void add_chunk_gradients(int64_t rows, int64_t keys, TileColumns values, float* key_gradient,
                           float* value_gradient) {
    const int64_t m = padded_tile(keys), n = padded_tile(rows), stride = padded_brick(rows);
    const TileRows query{query_.data(), dim_, rows, dim_}, out{out_gradient_.data(), dim_, rows, dim_};
    kernel_.pack_transposed(query, packed_query_.data());
    kernel_.pack_transposed(out, packed_out_gradient_.data());
    kernel_.gemm({m, n, dim_, key_.data(), dim_, packed_query_.data(), product_.data(), stride, false});
    kernel_.gemm({m, n, dim_, value_.data(), dim_, packed_out_gradient_.data(), gradient_product_.data(),
                  stride, false});
    values.key_count = keys, values.row_count = rows, values.stride = stride;
    values.product = product_.data(), values.gradient = gradient_product_.data();
    values.weight = weight_.data(), values.logit_gradient = logit_gradient_.data();
    kernel_.softmax_backward_columns(values);
    kernel_.pack_rows(query, packed_query_.data());
    kernel_.pack_rows(out, packed_out_gradient_.data());
    kernel_.gemm(
        {m, dim_, stride, weight_.data(), stride, packed_out_gradient_.data(), value_gradient, dim_, true});
    kernel_.gemm(
        {m, dim_, stride, logit_gradient_.data(), stride, packed_query_.data(), key_gradient, dim_, true});
  }

 private:
  void gather(const RowTile& tile, const Rows& from, uint16_t* to) const {
    for_each_gathered(tile, from, head_dim_, [&](const void* row) {
      std::memcpy(to, row, static_cast<size_t>(head_dim_) * 2);
      std::fill(to + head_dim_, to + dim_, uint16_t{0});
      to += dim_;
    });
  }

  void copy(const TileRows& from, uint16_t* to) const {
    for (int64_t i = 0; i < from.count; ++i, to += dim_) {
      std::memcpy(to, from.data + i * from.stride, static_cast<size_t>(head_dim_) * 2);
      std::fill(to + head_dim_, to + dim_, uint16_t{0});
    }
  }

  const TileKernels& kernel_;
  TileScope scope_;
  int64_t head_dim_, dim_;
  Buffer<uint16_t> key_, value_, key_columns_, value_columns_;                  // of one key tile
  Buffer<uint16_t> query_, out_gradient_, packed_query_, packed_out_gradient_;  // of one row tile
  Buffer<uint16_t> weight_, logit_gradient_;
  Buffer<float> product_, gradient_product_;
};

}  // namespace resona::cpu
