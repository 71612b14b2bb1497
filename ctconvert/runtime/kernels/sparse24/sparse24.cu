// 2:4 sparse matmul for SM90 on CUTLASS 3.x: D = scale_x * (scale_w * (W @ x^T)) + bias.
//
// CUTLASS wants the sparse operand as A, so the product is computed transposed: A is the weight
// [N, K] (kept values and metadata), B is x^T, and the column-major D [N, tokens] is the row-major
// result [tokens, N]. One object file holds one variant (tile, cluster, schedule); the macros
// below come from the variant table of cutlass.py:
//   CT_NAME        exported symbol
//   CT_ELEMENT     element of the weight and of x
//   CT_ACCUMULATOR float or int32_t
//   CT_OUT         element of the result and of the bias
//   CT_TILE_N, CT_TILE_T, CT_TILE_K  tile along N, tokens and K
//   CT_CLUSTER_N, CT_CLUSTER_T       cluster along N and tokens
//   CT_MAINLOOP    a kernel schedule of namespace cutlass::gemm
//   CT_EPILOGUE    an epilogue schedule of namespace cutlass::epilogue

#include <cuda_runtime.h>

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using Element = CT_ELEMENT;
using Accumulator = CT_ACCUMULATOR;
using Out = CT_OUT;
using Tile = Shape<Int<CT_TILE_N>, Int<CT_TILE_T>, Int<CT_TILE_K>>;
using Cluster = Shape<Int<CT_CLUSTER_N>, Int<CT_CLUSTER_T>, _1>;
constexpr int kAlignAB = 128 / cutlass::sizeof_bits<Element>::value;
constexpr int kAlignD = 128 / cutlass::sizeof_bits<Out>::value;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// A scale is a vector or, with a stride of false, one number; a null pointer stands for 1.
using RowScale = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<bool, _0, int64_t>>;
using TokenScale = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, bool, int64_t>>;
using Bias = fusion::Sm90ColBroadcast<0, Tile, Out, float, Stride<_1, _0, int64_t>>;
using Scaled = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>,
                               RowScale, fusion::Sm90AccFetch>;
using Epilogue = fusion::Sm90EVT<
    fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Out, float, kRound>, TokenScale, Scaled,
    Bias>;

using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, Accumulator, float, void,
    cutlass::layout::ColumnMajor, kAlignD, Out, cutlass::layout::ColumnMajor, kAlignD,
    cutlass::epilogue::CT_EPILOGUE, Epilogue>::CollectiveOp;

using Stock = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
    kAlignAB, Element, cutlass::layout::ColumnMajor, kAlignAB, Accumulator, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename CollectiveEpilogue::SharedStorage))>,
    cutlass::gemm::CT_MAINLOOP>::CollectiveOp;

// CUTLASS's sparse mainloop, with the matrix instructions of one k-tile always in flight. The stock
// one waits for all of them before it reads the metadata of the next k-tile, which leaves the
// tensor cores idle each time. Here two register sets hold the metadata of two k-tiles in turn, and
// one is read while the other is in use. Loads, barriers and layouts are the stock ones.
struct CollectiveMainloop : Stock {
  using typename Stock::MainloopPipeline;
  using typename Stock::Params;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using typename Stock::TiledMma;
  static constexpr bool kWide = sizeof(Element) == 2;
  static constexpr int kGroups = size(TiledMma{}) / cutlass::NumThreadsPerWarpGroup;
  static constexpr int kRowBlocks = CT_TILE_N / 64;
  static constexpr int kSteps = CT_TILE_K / (kWide ? 32 : 64);
  using Meta = decltype(make_tensor<uint32_t>(
      Shape<_1, Int<kRowBlocks / kGroups>, Int<kSteps>>{}));

  // A thread's metadata of one k-tile, as wgmma wants them. The tile lies in shared memory in
  // blocks of 64 rows x 128 columns (1024 bytes), first along the rows; each group of 128 threads
  // has every kGroups-th block of rows.
  CUTLASS_DEVICE static void load_meta(Meta& meta, uint8_t const* tile, int thread) {
    int const lane = thread % 32, warp = thread / 32 % 4, group = thread / 128;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRowBlocks / kGroups; ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < CT_TILE_K / 128; ++j) {
        uint8_t const* block = tile + 1024 * (group + kGroups * i + kRowBlocks * j);
        if constexpr (kWide) {
          block += 256 * warp + 128 * (lane % 2) + 16 * (lane / 4);
          uint4 const words = *reinterpret_cast<uint4 const*>(block);
          meta(0, i, 4 * j) = words.x;
          meta(0, i, 4 * j + 1) = words.y;
          meta(0, i, 4 * j + 2) = words.z;
          meta(0, i, 4 * j + 3) = words.w;
        } else {
          block += 16 * (16 * warp + 8 * (lane % 2) + lane / 4) + 4 * (lane / 2 % 2);
          meta(0, i, 2 * j) = *reinterpret_cast<uint32_t const*>(block);
          meta(0, i, 2 * j + 1) = *reinterpret_cast<uint32_t const*>(block + 8);
        }
      }
    }
  }

  template <class FrgTensorC>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read, FrgTensorC& accum,
                          int k_tile_count, int thread_idx, TensorStorage& shared_tensors,
                          Params const&) {
    Tensor sA = make_tensor(make_smem_ptr(shared_tensors.smem_A.begin()),
                            typename Stock::SmemLayoutA{});
    Tensor sB = make_tensor(make_smem_ptr(shared_tensors.smem_B.begin()),
                            typename Stock::SmemLayoutB{});
    auto const* sE = reinterpret_cast<uint8_t const*>(&shared_tensors.smem_E);
    int const group = __shfl_sync(0xFFFFFFFF, thread_idx / cutlass::NumThreadsPerWarpGroup, 0);
    TiledMma tiled_mma;
    auto thread_mma = tiled_mma.get_thread_slice(group * cutlass::NumThreadsPerWarpGroup);
    Tensor rA = thread_mma.make_fragment_A(thread_mma.partition_A(sA));  // (MMA,M,K,PIPE)
    Tensor rB = thread_mma.make_fragment_B(thread_mma.partition_B(sB));  // (MMA,N,K,PIPE)

    // Waits for a k-tile, reads its metadata and starts its matrix instructions.
    auto const start = [&](Meta& meta) {
      pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
      int const stage = read.index();
      load_meta(meta, sE + stage * (CT_TILE_N * CT_TILE_K / 8), thread_idx);
      warpgroup_fence_operand(accum);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        cute::gemm(tiled_mma, make_zip_tensor(rA(_, _, k, stage), meta(_, _, k)),
                   rB(_, _, k, stage), accum);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      ++read;
    };
    // Waits for the k-tile before the one just started and frees its stage.
    PipelineState done = read;
    auto const finish = [&] {
      warpgroup_wait<1>();
      warpgroup_fence_operand(accum);
      pipeline.consumer_release(done);
      ++done;
    };

    Meta even, odd;
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    start(even);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int left = k_tile_count - 1; left > 0; left -= 2) {
      start(odd);
      finish();
      if (left == 1) break;
      start(even);
      finish();
    }
    warpgroup_fence_operand(accum);
  }

  CUTLASS_DEVICE void mma_tail(MainloopPipeline pipeline, PipelineState done, int k_tile_count) {
    warpgroup_wait<0>();
    done.advance(k_tile_count - 1);
    pipeline.consumer_release(done);
  }
};

using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop,
                                                    CollectiveEpilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

}  // namespace

// Returns the number of a cutlass::Status, 0 where the kernel was launched. No variant needs a
// workspace: the persistent scheduler keeps no state and no tile is split along K.
extern "C" int CT_NAME(const void* weight, const void* meta, const void* x, void* out,
                       const float* weight_scale, int weight_scale_per_row, const float* x_scale,
                       int x_scale_per_token, const void* bias, int n, int tokens, int k,
                       int swizzle, int raster, int device, int sm_count, void* stream) {
  using Config = typename CollectiveMainloop::SparseConfig;
  using RasterOrder = typename cutlass::gemm::kernel::detail::RasterOrderOptions;
  auto const shape = make_shape(n, tokens, k, 1);

  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = shape;
  arguments.mainloop = {static_cast<Element const*>(weight),
                        Config::fill_layoutA(shape),
                        static_cast<Element const*>(x),
                        {static_cast<int64_t>(k), _1{}, int64_t(0)},
                        static_cast<typename CollectiveMainloop::ElementE const*>(meta),
                        Config::fill_layoutE(shape)};
  arguments.epilogue.thread = {
      {x_scale, 1.0f, {_0{}, x_scale_per_token != 0, 0}},
      {{weight_scale, 1.0f, {weight_scale_per_row != 0, _0{}, 0}}, {}, {}},
      {static_cast<Out const*>(bias), Out(0), {}},
      {}};
  arguments.epilogue.ptr_D = static_cast<Out*>(out);
  arguments.epilogue.dD = {_1{}, static_cast<int64_t>(n), int64_t(0)};
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = sm_count;
  arguments.scheduler.max_swizzle_size = swizzle;
  arguments.scheduler.raster_order = static_cast<RasterOrder>(raster);

  auto status = Gemm::can_implement(arguments);
  if (status == cutlass::Status::kSuccess) {
    status = Gemm().run(arguments, nullptr, static_cast<cudaStream_t>(stream));
  }
  return static_cast<int>(status);
}
