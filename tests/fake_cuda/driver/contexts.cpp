// Devices, and which context is current in which thread.
#include "state.hpp"

Settings settings;
std::recursive_mutex tables;
bool initialized = false;

static thread_local std::vector<Context*> stack;

// [driver] Primary Context Management "The primary context is unique per device and shared with the CUDA runtime API."
Context* primary(int device) {
  static std::map<int, std::unique_ptr<Context>> all;
  Lock lock(tables);
  auto& context = all[device];
  if (!context) context = std::make_unique<Context>(Context{device});
  return context.get();
}

Context* current() { return stack.empty() ? nullptr : stack.back(); }

// [driver] cuCtxSetCurrent "If there exists a CUDA context stack on the calling CPU thread, this will replace the top
// of that stack with ctx. If ctx is NULL then this will be equivalent to popping the top of the calling CPU thread's
// CUDA context stack (or a no-op if the calling CPU thread's CUDA context stack is empty)."
void make_current(Context* context) {
  if (!stack.empty()) stack.pop_back();
  if (context) stack.push_back(context);
}

// [driver] cuInit "If cuInit() has not been called, any function from the driver API will return
// CUDA_ERROR_NOT_INITIALIZED."
// [driver] CUDA_ERROR_LAUNCH_FAILED "This leaves the process in an inconsistent state and any further CUDA work will
// return the same error."
Status ready() { return initialized ? broken : refuse(kNotInitialized, "cuInit was not called"); }

// [driver] CUDA_ERROR_INVALID_CONTEXT "This most frequently indicates that there is no context bound to the current
// thread."
Status in_context() {
  REQUIRE(ready());
  return current() ? kSuccess : refuse(kInvalidContext, "no context is current in this thread");
}

static Status known(int device) {
  REQUIRE(ready());
  return device >= 0 && device < settings.devices ? kSuccess : refuse(kInvalidDevice, "there is no such device");
}

API int cuInit(unsigned flags) {
  if (flags) return kInvalidValue;  // [driver] cuInit "Currently, the Flags parameter must be 0."
  initialized = true;
  return kSuccess;
}

API int cuDriverGetVersion(int* version) {
  *version = settings.version;
  return kSuccess;
}

API int cuDeviceGetCount(int* count) {
  REQUIRE(ready());
  *count = settings.devices;
  return kSuccess;
}

API int cuDeviceGet(int* device, int ordinal) {
  REQUIRE(known(ordinal));
  *device = ordinal;
  return kSuccess;
}

API int cuDeviceGetName(char* name, int length, int device) {
  REQUIRE(known(device));
  snprintf(name, length, "none (driver stand-in)");
  return kSuccess;
}

API int cuDeviceTotalMem_v2(std::size_t* bytes, int device) {
  REQUIRE(known(device));
  *bytes = 80ull << 30;
  return kSuccess;
}

API int cuDeviceGetUuid_v2(void* uuid, int device) {
  REQUIRE(known(device));
  memset(uuid, device + 1, 16);
  return kSuccess;
}

API int cuDeviceGetPCIBusId(char* text, int length, int device) {
  REQUIRE(known(device));
  snprintf(text, length, "0000:%02x:00.0", device + 1);
  return kSuccess;
}

// By CUdevice_attribute; what nobody asks for is 0.
int attribute(int which) {
  switch (which) {
    case 1: return 1024;           // threads of a block
    case 2: case 3: return 1024;   // along x and y
    case 4: return 64;             // along z
    case 5: return 2147483647;     // blocks along x
    case 6: case 7: return 65535;  // along y and z
    case 8: return 48 * 1024;      // shared memory of a block, unless more is asked for
    case 9: return 65536;          // constant memory
    case 10: return 32;            // lanes of a warp
    case 12: return 65536;         // registers of a block
    case 13: return 1980000;       // kHz
    case 16: return settings.multiprocessors;
    case 36: return 2619000;       // kHz of the memory
    case 37: return 5120;          // bits of its bus
    case 38: return 50 << 20;      // second-level cache
    case 39: return 2048;          // threads of a multiprocessor
    case 41: return 1;             // one address space
    case 75: return settings.major;
    case 76: return settings.minor;
    case 81: return settings.shared_optin + 1024;  // shared memory of a multiprocessor
    case 82: return 65536;                         // its registers
    case 97: return settings.shared_optin;         // shared memory of a block that asks for more
    case 106: return 32;                           // blocks of a multiprocessor
    default: return 0;
  }
}

API int cuDeviceGetAttribute(int* value, int which, int device) {
  REQUIRE(known(device));
  *value = attribute(which);
  return kSuccess;
}

API int cuDevicePrimaryCtxRetain(Context** context, int device) {
  REQUIRE(known(device));
  *context = primary(device);
  (*context)->retained++;
  return kSuccess;
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
  REQUIRE(known(device));
  primary(device)->retained--;
  return kSuccess;
}

API int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  REQUIRE(known(device));
  *flags = 0;
  *active = primary(device)->retained > 0;
  return kSuccess;
}

// [driver] cuCtxGetCurrent "If no context is bound to the calling CPU thread then *pctx is set to NULL and CUDA_SUCCESS
// is returned."
API int cuCtxGetCurrent(Context** context) {
  if (!initialized) return kNotInitialized;
  *context = current();
  return kSuccess;
}

API int cuCtxSetCurrent(Context* context) {
  if (!initialized) return kNotInitialized;
  make_current(context);
  return kSuccess;
}

API int cuCtxPushCurrent_v2(Context* context) {
  if (!initialized) return kNotInitialized;
  if (!context) return refuse(kInvalidContext, "cuCtxPushCurrent of no context");
  stack.push_back(context);
  return kSuccess;
}

API int cuCtxPopCurrent_v2(Context** context) {
  if (stack.empty()) return refuse(kInvalidContext, "cuCtxPopCurrent of an empty stack");
  if (context) *context = stack.back();
  stack.pop_back();
  return kSuccess;
}

API int cuCtxGetDevice(int* device) {
  REQUIRE(in_context());
  *device = current()->device;
  return kSuccess;
}

API int cuCtxSynchronize() {
  REQUIRE(in_context());
  REQUIRE(encompasses(current(), "cuCtxSynchronize"));
  return run_all();
}
