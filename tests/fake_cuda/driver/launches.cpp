// Launches: held to what the cubin and the device allow, then handed over, with the arguments' bytes.
#include <array>
#include <chrono>

#include "state.hpp"

LaunchFunction on_launch = nullptr;
thread_local bool interrupted = false;

extern "C" void PyErr_SetInterrupt();

bool is_kernel(Kernel*);

namespace {

struct Shape {
  unsigned grid[3], block[3], shared;
};

Status fits(const Kernel& kernel, const Shape& shape) {
  const auto& [grid, block, shared] = shape;
  // The device's CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, _Y, _Z. A grid without blocks is refused, too.
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535)
    return refuse(kInvalidValue, "launch: the grid");
  // [driver] CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK "The maximum number of threads per block, beyond which a launch of
  // the function would fail."
  const std::uint64_t threads = static_cast<std::uint64_t>(block[0]) * block[1] * block[2];
  if (!threads || threads > kernel.max_threads) return refuse(kInvalidValue, "launch: the block");
  // [driver] CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES "If the user-specified dynamic shared memory size is
  // larger than this value, the launch will fail."
  if (static_cast<int>(shared) > kernel.dynamic_shared)
    return refuse(kInvalidValue, "launch: more dynamic shared memory than was allowed");
  // [guide] Thread Block Clusters "The grid dimension must be a multiple of cluster size."
  if (grid[0] % kernel.cluster) return refuse(kInvalidClusterSize, "launch: the grid is no multiple of the cluster");
  return kSuccess;
}

// [driver] cuLaunchKernel "Each of kernelParams[0] through kernelParams[N-1] must point to a region of memory from
// which the actual kernel parameter will be copied." They are copied now, side by side.
std::string arguments_of(const Kernel& kernel, void** params) {
  std::string bytes;
  for (std::size_t i = 0; i < kernel.arguments.size(); i++)
    bytes.append(static_cast<const char*>(params[i]), kernel.arguments[i]);
  return bytes;
}

Status run(const Kernel& kernel, const Shape& shape, const std::string& arguments, int device, Handle stream) {
  while (settings.hanging) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  if (settings.failing_kernel && !--settings.failing_kernel) return refuse(kLaunchFailed, "a kernel fails");
  if (!on_launch) return kSuccess;
  int status = kInterrupted;
  on_launch(kernel.module->path.c_str(), kernel.name.c_str(), device, shape.grid, arguments.data(), arguments.size(),
            stream, &status);
  if (status != kInterrupted) return static_cast<Status>(status);
  interrupted = true;
  PyErr_SetInterrupt();  // what ended the function is not raised through C: Python raises it behind the driver's call
  return kSuccess;
}

}  // namespace

API int cuLaunchKernel(
    Kernel* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared, Handle handle, void** params, void** extra) {
  REQUIRE(in_context());
  // [driver] CUDA_ERROR_INVALID_HANDLE "This indicates that a resource handle passed to the API call was not valid." It
  // may be that of a kernel that was unloaded, of a stream that was destroyed, or of another context than the current.
  if (!is_kernel(kernel)) return refuse(kInvalidHandle, "launch: not a kernel, or its module is gone");
  if (kernel->module->context != current()) return refuse(kInvalidHandle, "launch: a kernel of another context");
  StreamRef stream = stream_of(handle);
  if (!stream) return refuse(kInvalidHandle, "launch: no such stream");
  if (stream->context != current()) return refuse(kInvalidHandle, "launch: a stream of another context");
  const Shape shape = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared};
  REQUIRE(fits(*kernel, shape));
  if (extra || (!params && !kernel->arguments.empty())) return refuse(kInvalidValue, "launch: the arguments");
  if (settings.failing_launch && !--settings.failing_launch)
    return refuse(static_cast<Status>(settings.launch_status), "launch: refused");
  const int device = current()->device;
  const std::string arguments = arguments_of(*kernel, params);
  note("launch %s grid=%u,%u,%u block=%u,%u,%u smem=%u params=%zu stream=%llx dev=%d%s", kernel->name.c_str(), grid_x,
       grid_y, grid_z, block_x, block_y, block_z, shared, arguments.size(), static_cast<unsigned long long>(handle),
       device, stream->capture ? " captured" : "");
  return push(stream, [=] { return run(*kernel, shape, arguments, device, handle); });
}

// The launch of attributes: none is served but the shape.
API int cuLaunchKernelEx(const void* config, Kernel* kernel, void** params, void** extra) {
  struct Config {
    unsigned grid[3], block[3], shared;
    Handle stream;
    void* attributes;
    unsigned attribute_count;
  };
  const auto& c = *static_cast<const Config*>(config);
  if (c.attribute_count) return refuse(kNotSupported, "launch: attributes");
  return cuLaunchKernel(kernel, c.grid[0], c.grid[1], c.grid[2], c.block[0], c.block[1], c.block[2], c.shared, c.stream,
                        params, extra);
}

API int cuLaunchCooperativeKernel(...) { return refuse(kNotSupported, "cuLaunchCooperativeKernel"); }
