// The CUDA runtime as CuPy calls it. CuPy's wheels carry the runtime inside, so no library can take its place: each
// function here has the C signature of one in CuPy's own table (`__pyx_capi__` of cupy_backends.cuda.api.runtime), and
// replaces it there. A failure raises CuPy's CUDARuntimeError.
#include "state.hpp"

extern "C" {
struct Object;
typedef Object* (*Method)(Object*, Object*);
struct MethodDef {
  const char* name;
  Method function;
  int flags;
  const char* doc;
};
extern Object _Py_NoneStruct;
void Py_IncRef(Object*);
void Py_DecRef(Object*);
void PyErr_SetObject(Object*, Object*);
Object* PyLong_FromLong(long);
Object* Py_BuildValue(const char*, ...);
Object* PyCFunction_NewEx(MethodDef*, Object*, Object*);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);

int cuMemAlloc_v2(Address*, std::size_t);
int cuMemFree_v2(Address);
int cuMemHostAlloc(void**, std::size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemsetD8Async(Address, unsigned char, std::size_t, Handle);
int cuStreamCreate(Handle*, unsigned);
int cuStreamDestroy_v2(Handle);
int cuStreamSynchronize(Handle);
int cuStreamQuery(Handle);
int cuStreamGetFlags(Handle, unsigned*);
int cuStreamIsCapturing(Handle, int*);
int cuStreamBeginCapture_v2(Handle, int);
int cuStreamEndCapture(Handle, Graph**);
int cuStreamWaitEvent(Handle, Event*, unsigned);
int cuGraphInstantiateWithFlags(Graph**, Graph*, unsigned long long);
int cuGraphLaunch(Graph*, Handle);
int cuGraphDestroy(Graph*);
int cuGraphExecDestroy(Graph*);
int cuEventCreate(Event**, unsigned);
int cuEventDestroy_v2(Event*);
int cuEventRecord(Event*, Handle);
int cuEventQuery(Event*);
int cuEventSynchronize(Event*);
int cuEventElapsedTime(float*, Event*, Event*);
int cuCtxSynchronize();
}
int attribute(int);

namespace {

Object* error_class = nullptr;
thread_local int device_here = 0;  // what cudaSetDevice said in this thread

bool raised(int status) {
  if (!status) return false;
  Object* value = PyLong_FromLong(status);
  PyErr_SetObject(error_class, value);
  Py_DecRef(value);
  return true;
}

Object* none(int status) {
  if (raised(status)) return nullptr;
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

// [guide] Runtime Initialization "This context is the primary context for this device and is initialized at the first
// runtime function which requires an active context on this device." Interoperability between Runtime and Driver APIs
// "If a context is created and made current via the driver API, subsequent runtime calls will pick up this context
// instead of creating a new one."
void bind() {
  initialized = true;
  if (current() && !(settings.runtime_apart && current()->device != device_here)) return;
  primary(device_here)->retained = 1;
  make_current(primary(device_here));
}

// Runs what may wait, or call Python, without the interpreter's lock.
template <class Call>
int unlocked(Call call) {
  void* thread = PyEval_SaveThread();
  const int status = call();
  PyEval_RestoreThread(thread);
  return status;
}

template <class T, class Call>
T made(Call call) {
  T value{};
  bind();
  if (raised(unlocked([&] { return call(&value); }))) return T{};
  return value;
}

template <class Call>
Object* done(Call call) {
  bind();
  return none(unlocked(call));
}

// What a query gives: that work is not done is no error.
Object* asked(int status) { return status && status != kNotReady ? none(status) : PyLong_FromLong(status); }

}  // namespace

API void rt_error_class(Object* type) {
  error_class = type;
  Py_IncRef(type);
}

API Object* rt_ensure_context() { return done([] { return 0; }); }

// Devices
API int rt_getDevice() { return !settings.runtime_apart && current() ? current()->device : device_here; }
static Object* get_device(Object*, Object*) { return PyLong_FromLong(rt_getDevice()); }
static MethodDef get_device_method = {"getDevice", get_device, 4 /* METH_NOARGS */, nullptr};
API Object* rt_getDevice_function() { return PyCFunction_NewEx(&get_device_method, nullptr, nullptr); }

// [runtime] cudaSetDevice "This function will also immediately initialize the runtime state on the primary context, and
// the context will be current on device immediately."
API Object* rt_setDevice(int device) {
  if (device < 0 || device >= settings.devices) return none(refuse(kInvalidDevice, "cudaSetDevice"));
  device_here = device;
  initialized = true;
  primary(device)->retained = 1;
  make_current(primary(device));
  return none(kSuccess);
}

API int rt_getDeviceCount() { return settings.devices; }
API int rt_driverGetVersion() { return settings.version; }
API int rt_deviceGetAttribute(int which, int device) {
  if (device < 0 || device >= settings.devices) {
    raised(refuse(kInvalidDevice, "cudaDeviceGetAttribute"));
    return -1;
  }
  return attribute(which);
}
API Object* rt_deviceSynchronize() { return done(cuCtxSynchronize); }
API int rt_deviceCanAccessPeer(int, int) { return 0; }
API Object* rt_nothing() { return none(kSuccess); }

// Memory
API Object* rt_memGetInfo() {
  bind();
  return Py_BuildValue("(LL)", 79ll << 30, 80ll << 30);
}
API std::intptr_t rt_malloc(std::size_t bytes) {
  return made<Address>([=](Address* p) { return cuMemAlloc_v2(p, bytes); });
}
API Object* rt_free(std::intptr_t p) { return done([=] { return cuMemFree_v2(p); }); }
API std::intptr_t rt_hostAlloc(std::size_t bytes, unsigned flags) {
  return reinterpret_cast<std::intptr_t>(made<void*>([=](void** p) { return cuMemHostAlloc(p, bytes, flags); }));
}
API Object* rt_freeHost(std::intptr_t p) { return done([=] { return cuMemFreeHost(reinterpret_cast<void*>(p)); }); }
API Object* rt_memcpy(std::intptr_t to, std::intptr_t from, std::size_t bytes, int) {
  return done([=] { return ready() ? ready() : copy(stream_of(0), to, from, bytes, true); });
}
API Object* rt_memcpyAsync(std::intptr_t to, std::intptr_t from, std::size_t bytes, int, std::intptr_t stream) {
  return done([=] { return ready() ? ready() : copy(stream_of(stream), to, from, bytes, false); });
}
API Object* rt_memset(std::intptr_t to, int value, std::size_t bytes) {
  return done([=] { return cuMemsetD8Async(to, value, bytes, 0); });
}
API Object* rt_memsetAsync(std::intptr_t to, int value, std::size_t bytes, std::intptr_t stream) {
  return done([=] { return cuMemsetD8Async(to, value, bytes, stream); });
}
API int rt_pointerGetMemoryType(std::intptr_t p) {
  Lock lock(tables);
  Block* block = block_at(p);
  return !block ? 0 : block->on_host ? 1 : 2;  // unregistered, host, device
}
API int rt_pointerGetDevice(std::intptr_t p) {
  Lock lock(tables);
  Block* block = block_at(p);
  return block ? block->device : -1;
}

// Streams
API std::intptr_t rt_streamCreate() {
  return made<Handle>([](Handle* h) { return cuStreamCreate(h, 0); });
}
API std::intptr_t rt_streamCreateWithFlags(unsigned flags) {
  return made<Handle>([=](Handle* h) { return cuStreamCreate(h, flags); });
}
API std::intptr_t rt_streamCreateWithPriority(unsigned flags, int) { return rt_streamCreateWithFlags(flags); }
API Object* rt_streamDestroy(std::intptr_t h) { return done([=] { return cuStreamDestroy_v2(h); }); }
API Object* rt_streamSynchronize(std::intptr_t h) { return done([=] { return cuStreamSynchronize(h); }); }
API Object* rt_streamQuery(std::intptr_t h) {
  bind();
  return asked(cuStreamQuery(h));
}
API unsigned rt_streamGetFlags(std::intptr_t h) {
  return made<unsigned>([=](unsigned* flags) { return cuStreamGetFlags(h, flags); });
}
API int rt_streamGetPriority(std::intptr_t) { return 0; }
API Object* rt_streamWaitEvent(std::intptr_t h, std::intptr_t event) {
  return done([=] { return cuStreamWaitEvent(h, reinterpret_cast<Event*>(event), 0); });
}

// Capture and graphs. CuPy's functions with a default have a struct of what was given behind their arguments.
API int rt_streamIsCapturing(std::intptr_t h) {
  bind();
  int state = 0;
  return raised(cuStreamIsCapturing(h, &state)) ? -1 : state == 1;
}
API Object* rt_streamBeginCapture(std::intptr_t h, int mode) {
  return done([=] { return cuStreamBeginCapture_v2(h, mode); });
}
API Object* rt_streamBeginCapture_c(std::intptr_t h, int, const int* given) {
  return rt_streamBeginCapture(h, given && given[0] > 0 ? given[1] : 2);  // relaxed is CuPy's default
}
API std::intptr_t rt_streamEndCapture(std::intptr_t h) {
  return reinterpret_cast<std::intptr_t>(made<Graph*>([=](Graph** g) { return cuStreamEndCapture(h, g); }));
}
API std::intptr_t rt_graphInstantiate(std::intptr_t graph) {
  return reinterpret_cast<std::intptr_t>(made<Graph*>(
      [=](Graph** g) { return cuGraphInstantiateWithFlags(g, reinterpret_cast<Graph*>(graph), 0); }));
}
API Object* rt_graphLaunch(std::intptr_t graph, std::intptr_t h) {
  return done([=] { return cuGraphLaunch(reinterpret_cast<Graph*>(graph), h); });
}
API Object* rt_graphUpload(std::intptr_t, std::intptr_t) { return none(kSuccess); }
API Object* rt_graphDestroy(std::intptr_t graph) { return none(cuGraphDestroy(reinterpret_cast<Graph*>(graph))); }
API Object* rt_graphExecDestroy(std::intptr_t graph) {
  return none(cuGraphExecDestroy(reinterpret_cast<Graph*>(graph)));
}

// Events
API std::intptr_t rt_eventCreateWithFlags(unsigned flags) {
  return reinterpret_cast<std::intptr_t>(made<Event*>([=](Event** e) { return cuEventCreate(e, flags); }));
}
API std::intptr_t rt_eventCreate() { return rt_eventCreateWithFlags(0); }
API Object* rt_eventDestroy(std::intptr_t e) { return none(cuEventDestroy_v2(reinterpret_cast<Event*>(e))); }
API Object* rt_eventRecord(std::intptr_t e, std::intptr_t h) {
  return done([=] { return cuEventRecord(reinterpret_cast<Event*>(e), h); });
}
API Object* rt_eventQuery(std::intptr_t e) {
  bind();
  return asked(cuEventQuery(reinterpret_cast<Event*>(e)));
}
API Object* rt_eventSynchronize(std::intptr_t e) {
  return done([=] { return cuEventSynchronize(reinterpret_cast<Event*>(e)); });
}
API float rt_eventElapsedTime(std::intptr_t from, std::intptr_t to) {
  return made<float>([=](float* ms) {
    return cuEventElapsedTime(ms, reinterpret_cast<Event*>(from), reinterpret_cast<Event*>(to));
  });
}
