// A CUDA that is not there, for fake tensors on a build of torch that has none.
//
//   Hooks    which device and how many: autograd and torch's accelerator ask
//   Guard    the device's streams and events: autograd asks
//   choose   which kernel scaled_dot_product_attention would take
//
// None of these needs a GPU. Loaded before torch is imported; see machine.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  using Flag = c10::EventFlag;
  const Stream stream{Stream::DEFAULT, Device(CUDA, 0)};
  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device) const override { return Device(CUDA, 0); }
  Device getDevice() const override { return Device(CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const Flag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

// As torch's own aten/src/ATen/native/transformers/cuda/sdp_utils.cpp decides on compute capability
// 8.0 or 9.0, with cuDNN's kernel aside. Flash attention wants half precision and heads of at most
// 256; the memory-efficient kernel wants heads aligned to 16 bytes, and takes a mask.
int64_t choose(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const std::optional<at::Tensor>& mask, double dropout, bool causal,
               std::optional<double>, bool gqa) {
  const sdp::sdp_params p{q, k, v, mask, dropout, causal, gqa};
  const bool half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const bool taken = half || q.scalar_type() == at::kFloat;
  const auto d = q.sym_size(-1), dk = k.sym_size(-1), dv = v.sym_size(-1);
  const bool shapes = sdp::check_tensor_shapes(p, false) &&
                      sdp::check_nonzero_sequence_lengths_dense(p, false);
  if (shapes && half && d == dv && d <= 256 && sdp::check_for_attn_mask(p, false) &&
      sdp::check_last_dim_stride_equals_1_dense<true>(p, false) &&
      sdp::check_batch_size_and_num_heads_dense<true>(p, false))
    return static_cast<int64_t>(sdp::SDPBackend::flash_attention);
  const int64_t unit = half ? 8 : 4;
  if (shapes && taken && d == dk && d % unit == 0 && dv % unit == 0 &&
      sdp::check_last_dim_stride_equals_1_dense<false>(p, false) &&
      sdp::check_batch_size_and_num_heads_dense<false>(p, false))
    return static_cast<int64_t>(sdp::SDPBackend::efficient_attention);
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

std::unique_ptr<at::CUDAHooksInterface> hooks(at::CUDAHooksArgs) {
  return std::make_unique<Hooks>();
}

const bool early = [] {  // when this is loaded: torch asks once and keeps the answer
  at::CUDAHooksRegistry()->Register("CUDAHooks", &hooks);
  c10::impl::registerDeviceGuard(CUDA, new Guard());
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose);
  return true;
}();
}  // namespace

extern "C" int fake_cuda_works() { return at::detail::getCUDAHooks().isBuilt(); }
