// The tests' side: settings and adversaries, a log, and how a library is asked for a function by name.
#include <cstdarg>
#include <cstdio>
#include <dlfcn.h>

#include "state.hpp"

static std::vector<std::string> lines;
static bool logging = false;

void note(const char* format, ...) {
  if (!logging) return;
  char line[512];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  Lock lock(tables);
  lines.push_back(line);
}

Status refuse(Status status, const char* why) {
  note("refused %d: %s", status, why);
  return status;
}

API int cuGetErrorName(int status, const char** name) {
  static const std::map<int, const char*> names = {
      {kSuccess, "CUDA_SUCCESS"},
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
      {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
      {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE"},
      {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
      {kFileNotFound, "CUDA_ERROR_FILE_NOT_FOUND"},
      {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {kNotFound, "CUDA_ERROR_NOT_FOUND"},
      {kNotReady, "CUDA_ERROR_NOT_READY"},
      {kLaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
      {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"},
      {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED"},
      {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
      {kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
      {kCaptureMerge, "CUDA_ERROR_STREAM_CAPTURE_MERGE"},
      {kCaptureUnmatched, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"},
      {kCaptureUnjoined, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
      {kCaptureIsolation, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
      {kCaptureImplicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
      {kCapturedEvent, "CUDA_ERROR_CAPTURED_EVENT"},
      {kCaptureWrongThread, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"},
      {kInvalidClusterSize, "CUDA_ERROR_INVALID_CLUSTER_SIZE"},
  };
  auto found = names.find(status);
  *name = found == names.end() ? "an error of no name here" : found->second;
  return kSuccess;
}

API int cuGetErrorString(int status, const char** text) { return cuGetErrorName(status, text); }

API int cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t, int* status) {
  static void* self = [] {
    Dl_info found;
    dladdr(reinterpret_cast<void*>(cuGetErrorName), &found);
    return dlopen(found.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  for (const char* version : {"_v2", ""})
    if ((*function = dlsym(self, (std::string(name) + version).c_str()))) {
      if (status) *status = 0;
      return kSuccess;
    }
  if (status) *status = 1;
  return status ? kSuccess : kNotFound;
}

API int cuGetProcAddress(const char* name, void** function, int version, std::uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

API int cuGetExportTable(const void**, const void*) { return kNotFound; }

API Settings* stand_in_settings() { return &settings; }
API void stand_in_on_launch(LaunchFunction function) { on_launch = function; }
API int stand_in_run_all() { return run_all(); }

// A process that a kernel's failure broke, made whole: no CUDA call can do that.
API void stand_in_mend() { broken = kSuccess; }

API void stand_in_log(int on) {
  Lock lock(tables);
  logging = on;
  lines.clear();
}

API int stand_in_lines(char* result, int size) {
  Lock lock(tables);
  std::string all;
  for (auto& line : lines) all += line + "\n";
  return snprintf(result, size, "%s", all.c_str());
}

API int stand_in_blocks(std::uint64_t* result, int room) {
  auto found = device_blocks();
  for (int i = 0; i < room && i < static_cast<int>(found.size()); i++) {
    result[2 * i] = found[i].begin;
    result[2 * i + 1] = found[i].bytes;
  }
  return static_cast<int>(found.size());
}

API int stand_in_device(Address address, int* device) {
  Lock lock(tables);
  Block* block = block_at(address);
  if (!block || block->on_host) return 0;
  *device = block->device;
  return 1;
}
