// The state of a CUDA driver that has no GPU: what every chapter of this folder shares.
//
//   contexts     devices, primary contexts, each thread's stack of contexts        contexts.cpp
//   memory       allocations with holes behind them, copies                        memory.cpp
//   streams      work that runs when somebody waits; events                        streams.cpp
//   graphs       capture in its three modes, graphs and their launches             graphs.cpp
//   modules      cubins, read as the ELF files they are                            modules.cpp
//   launches     kernels, whose work is handed to a function of the test's         launches.cpp
//   tensor maps  written in the form the emulator reads                            tensor_maps.cpp
//   runtime      what CuPy calls of the CUDA runtime, on top of these              runtime.cpp
//   control      the tests' side: settings, adversaries, a log                     control.cpp
//
// Each rule that a call is held to stands under the sentence of NVIDIA's manual that gives it: [driver] the CUDA Driver
// API reference, whose text is that of cuda.h, [runtime] the CUDA Runtime API reference, both of CUDA 13.0, [guide] the
// CUDA Programming Guide, by the title of a section. A rule without quotation marks is in no manual, or in our words.
// Where drivers differ, the strictest is imitated. Nothing of NVIDIA's is in here.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

using Address = std::uint64_t;
using Handle = std::uint64_t;  // of a stream; 0 and 1 are the legacy default stream, 2 the thread's own default one
using Lock = std::lock_guard<std::recursive_mutex>;

enum Status : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kFileNotFound = 301,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotReady = 600,
  kLaunchOutOfResources = 701,
  kLaunchFailed = 719,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureMerge = 902,
  kCaptureUnmatched = 903,
  kCaptureUnjoined = 904,
  kCaptureIsolation = 905,
  kCaptureImplicit = 906,
  kCapturedEvent = 907,
  kCaptureWrongThread = 908,
  kInvalidClusterSize = 912,
};

// What the machine is, and which adversaries it has.
struct Settings {
  int devices = 1, major = 9, minor = 0, multiprocessors = 132, shared_optin = 232448, version = 13000;
  bool late = true;              // work runs when somebody waits for it, and not before
  bool runtime_apart = false;    // the runtime keeps a device of its own, whatever context the driver has current
  bool hanging = false;          // kernels that begin do not end
  long long allocations = -1;    // how many more succeed; -1: all
  int failing_launch = 0, launch_status = kLaunchOutOfResources;  // the how manieth from now is refused, and how
  int failing_kernel = 0;        // the how manieth from now fails while it runs
  int failing_load = 0;          // the how manieth module from now cannot be loaded
};
extern Settings settings;

// One lock for the tables; never held while work runs or Python is called.
extern std::recursive_mutex tables;

struct Context {
  int device;
  int retained = 0;
};

struct Block {
  Address begin;
  std::size_t bytes;
  int device;
  bool on_host;
};

struct Capture;

using Work = std::function<Status()>;

struct Stream {
  Context* context;
  bool non_blocking = false, legacy = false;
  std::deque<Work> queue;
  std::uint64_t pushed = 0, done = 0;  // works, since the stream was made
  std::shared_ptr<Capture> capture;
};
using StreamRef = std::shared_ptr<Stream>;

struct Graph {
  std::vector<Work> nodes;
};

struct Capture {
  int mode;  // 0 global, 1 thread local, 2 relaxed
  std::thread::id thread;
  Stream* origin;
  bool blocking;  // one of its streams waits for the legacy stream
  bool invalid = false;
  std::map<Stream*, bool> joined;  // of the streams in it, whether some other one waits for its latest node
  Graph* graph;
};

struct Event {
  Context* context;
  bool timed = true, recorded = false;
  StreamRef stream;
  std::uint64_t at = 0;
  std::shared_ptr<Capture> capture;  // of the latest record
  double seconds = 0;                // when it was reached
};

struct Module;

struct Kernel {
  Module* module;
  std::string name;
  std::vector<unsigned> arguments;  // bytes of each
  unsigned max_threads = 1024, static_shared = 0, cluster = 1;
  int dynamic_shared = 48 * 1024;
};

struct Module {
  std::string path;
  Context* context;
  unsigned arch = 0;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

// contexts.cpp
extern bool initialized;
Context* current();
Context* primary(int device);
void make_current(Context*);
Status ready();       // whether the driver is initialized, and no earlier kernel has failed
Status in_context();  // and a context is current in this thread

// memory.cpp
Block* block_at(Address);  // under `tables`
std::vector<Block> device_blocks();
Status copy(StreamRef, Address to, Address from, std::size_t bytes, bool waits);

// streams.cpp
extern Status broken;  // what a kernel failed with: every later call gives it
StreamRef stream_of(Handle);
Status push(const StreamRef&, Work);
Status run_until(const StreamRef&, std::uint64_t count);
Status run_all();

// graphs.cpp
Status unsafe(const char* call);
Status encompasses(Context*, const char* call);  // whether one of its streams is captured
Status legacy_use(const StreamRef&, const char* call);
Status record(const StreamRef&, Work);
void invalidate(const std::shared_ptr<Capture>&);
extern std::set<std::shared_ptr<Capture>> captures;

// launches.cpp
typedef void (*LaunchFunction)(
    const char* path, const char* name, int device, const unsigned* shape, const void* params, std::uint64_t bytes,
    Handle stream, int* status);
extern LaunchFunction on_launch;
constexpr int kInterrupted = -1;  // what `status` is before the call, and stays where Ctrl-C ended it
extern thread_local bool interrupted;  // so that this thread waits for nothing more

// control.cpp
Status refuse(Status, const char* why);  // the status, written down
void note(const char* format, ...) __attribute__((format(printf, 1, 2)));

#define REQUIRE(call) \
  if (Status status_ = static_cast<Status>(call)) return status_
