// Streams and events. Work waits in its stream's queue until somebody waits for it, which is as late as CUDA allows.
#include <chrono>

#include "state.hpp"

Status broken = kSuccess;

static std::map<Handle, StreamRef> streams;
static std::map<int, StreamRef> legacy, per_thread;  // by device
static std::set<StreamRef> retired;                  // destroyed with work in them
static std::recursive_mutex device_at_work;          // one work at a time: whoever waits, runs

static StreamRef default_stream(bool own) {
  Context* context = current();
  if (!context) return nullptr;
  auto& stream = (own ? per_thread : legacy)[context->device];
  if (!stream) {
    stream = std::make_shared<Stream>();
    stream->context = context;
    stream->legacy = !own;
  }
  return stream;
}

StreamRef stream_of(Handle handle) {
  Lock lock(tables);
  if (handle <= 2) return default_stream(handle == 2);
  auto found = streams.find(handle);
  return found == streams.end() ? nullptr : found->second;
}

Status run_until(const StreamRef& stream, std::uint64_t count) {
  Lock alone(device_at_work);
  static thread_local int depth = 0;  // a work may wait for another stream's
  depth++;
  while (!interrupted) {
    Work work;
    {
      Lock lock(tables);
      if (stream->done >= count || stream->queue.empty()) break;
      work = stream->queue.front();
    }
    Status status = broken ? broken : work();  // after a failure nothing runs any more
    Lock lock(tables);
    if (status) broken = status;
    stream->queue.pop_front();
    stream->done++;
  }
  if (!--depth) interrupted = false;
  return broken;
}

Status run_all() {
  std::vector<StreamRef> all;
  {
    Lock lock(tables);
    for (auto& [handle, stream] : streams) all.push_back(stream);
    for (auto* defaults : {&legacy, &per_thread})
      for (auto& [device, stream] : *defaults) all.push_back(stream);
    all.insert(all.end(), retired.begin(), retired.end());
    retired.clear();
  }
  for (auto& stream : all) run_until(stream, stream->pushed);
  return broken;
}

// [driver] Stream synchronization behavior: "The legacy default stream is an implicit stream which synchronizes
// with all other streams in the same CUcontext except for non-blocking streams".
static std::vector<std::pair<StreamRef, std::uint64_t>> goes_before(const StreamRef& stream) {
  std::vector<std::pair<StreamRef, std::uint64_t>> first;
  auto wait = [&](const StreamRef& other) {
    if (other->done < other->pushed) first.push_back({other, other->pushed});
  };
  if (stream->legacy) {
    for (auto& [handle, other] : streams)
      if (other->context == stream->context && !other->non_blocking) wait(other);
    if (auto own = per_thread.find(stream->context->device); own != per_thread.end()) wait(own->second);
  } else if (!stream->non_blocking) {
    if (auto whole = legacy.find(stream->context->device); whole != legacy.end()) wait(whole->second);
  }
  return first;
}

Status push(const StreamRef& stream, Work work) {
  if (stream->capture) return record(stream, work);
  REQUIRE(legacy_use(stream, "work on the legacy stream"));
  {
    Lock lock(tables);
    auto first = goes_before(stream);
    stream->queue.push_back([first, work] {
      for (auto& [other, count] : first) REQUIRE(run_until(other, count));
      return work();
    });
    stream->pushed++;
  }
  return settings.late ? kSuccess : run_until(stream, stream->pushed);
}

API int cuStreamCreate(Handle* handle, unsigned flags) {
  REQUIRE(in_context());
  Lock lock(tables);
  auto stream = std::make_shared<Stream>();
  stream->context = current();
  stream->non_blocking = flags & 1;
  *handle = reinterpret_cast<Handle>(stream.get());
  streams[*handle] = stream;
  return kSuccess;
}

API int cuStreamCreateWithPriority(Handle* handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }

#define STREAM(handle)                \
  StreamRef stream = stream_of(handle); \
  if (!stream) return refuse(kInvalidHandle, __func__)

// [driver] cuStreamDestroy "In case the device is still doing work in the stream hStream when cuStreamDestroy() is
// called, the function will return immediately and the resources associated with hStream will be released automatically
// once the device has completed all work in hStream."
API int cuStreamDestroy_v2(Handle handle) {
  STREAM(handle);
  if (handle <= 2) return refuse(kInvalidHandle, "a default stream cannot be destroyed");
  Lock lock(tables);
  if (stream->done < stream->pushed) retired.insert(stream);
  streams.erase(handle);
  return kSuccess;
}

// [guide] Prohibited and Unhandled Operations "It is invalid to synchronize or query the execution status of a stream
// which is being captured or a captured event, because they do not represent items scheduled for execution."
static Status not_captured(const StreamRef& stream, const char* call) {
  if (!stream->capture) return legacy_use(stream, call);
  invalidate(stream->capture);
  return refuse(kCaptureUnsupported, call);
}

API int cuStreamSynchronize(Handle handle) {
  REQUIRE(in_context());
  STREAM(handle);
  REQUIRE(not_captured(stream, "cuStreamSynchronize"));
  if (stream->legacy) {
    std::vector<std::pair<StreamRef, std::uint64_t>> first;
    {
      Lock lock(tables);
      first = goes_before(stream);
    }
    for (auto& [other, count] : first) REQUIRE(run_until(other, count));
  }
  return run_until(stream, stream->pushed);
}

API int cuStreamQuery(Handle handle) {
  REQUIRE(in_context());
  STREAM(handle);
  REQUIRE(not_captured(stream, "cuStreamQuery"));
  return stream->done == stream->pushed ? kSuccess : kNotReady;
}

API int cuStreamGetCtx(Handle handle, Context** context) {
  REQUIRE(in_context());
  STREAM(handle);
  *context = stream->context;
  return kSuccess;
}

API int cuStreamGetFlags(Handle handle, unsigned* flags) {
  REQUIRE(in_context());
  STREAM(handle);
  *flags = stream->non_blocking;
  return kSuccess;
}

// Events ----------------------------------------------------------------------------------------------------------

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

API int cuEventCreate(Event** event, unsigned flags) {
  REQUIRE(in_context());
  *event = new Event;
  (*event)->context = current();
  (*event)->timed = !(flags & 2);
  return kSuccess;
}

API int cuEventDestroy_v2(Event* event) {
  // What was recorded of it may still be in a queue: the few bytes stay.
  event->stream = nullptr;
  return kSuccess;
}

API int cuEventRecord(Event* event, Handle handle) {
  REQUIRE(in_context());
  STREAM(handle);
  // [driver] cuEventRecord "hEvent and hStream must be from the same context otherwise CUDA_ERROR_INVALID_HANDLE is
  // returned."
  if (event->context != stream->context) return refuse(kInvalidHandle, "cuEventRecord in a stream of another context");
  event->recorded = true;
  event->stream = stream;
  event->capture = stream->capture;
  if (stream->capture) {
    if (stream->capture->invalid) return refuse(kCaptureInvalidated, "cuEventRecord");
    return kSuccess;
  }
  REQUIRE(push(stream, [event] {
    event->seconds = now();
    return kSuccess;
  }));
  event->at = stream->pushed;
  return kSuccess;
}

// [driver] cuThreadExchangeStreamCaptureMode "Note that the thread is still prohibited from API calls which necessarily
// conflict with stream capture, for example, attempting cuEventQuery on an event that was last recorded inside a
// capture sequence."
static Status askable(Event* event, const char* call) {
  REQUIRE(ready());
  if (event->capture) return refuse(kCapturedEvent, call);
  return unsafe(call);
}

static bool reached(const Event* event) { return !event->recorded || event->stream->done >= event->at; }

API int cuEventQuery(Event* event) {
  REQUIRE(askable(event, "cuEventQuery"));
  return reached(event) ? kSuccess : kNotReady;
}

API int cuEventSynchronize(Event* event) {
  REQUIRE(askable(event, "cuEventSynchronize"));
  return event->recorded ? run_until(event->stream, event->at) : kSuccess;
}

// [driver] cuEventElapsedTime "If cuEventRecord() has not been called on either event then CUDA_ERROR_INVALID_HANDLE is
// returned. If cuEventRecord() has been called on both events but one or both of them has not yet been completed (that
// is, cuEventQuery() would return CUDA_ERROR_NOT_READY on at least one of the events), CUDA_ERROR_NOT_READY is
// returned. If either event was created with the CU_EVENT_DISABLE_TIMING flag, then this function will return
// CUDA_ERROR_INVALID_HANDLE."
API int cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
  REQUIRE(ready());
  if (!from->recorded || !to->recorded || !from->timed || !to->timed) return refuse(kInvalidHandle, "elapsed time");
  if (!reached(from) || !reached(to)) return kNotReady;
  *milliseconds = static_cast<float>((to->seconds - from->seconds) * 1e3);
  return kSuccess;
}

API int cuStreamWaitEvent(Handle handle, Event* event, unsigned) {
  REQUIRE(in_context());
  STREAM(handle);
  // [driver] cuEventRecord "Before the first call to cuEventRecord(), an event represents an empty set of work".
  if (!event->recorded) return kSuccess;
  auto capture = event->capture;
  if (capture) {
    // [guide] Prohibited and Unhandled Operations "It is invalid to merge two separate capture graphs by waiting on a
    // captured event from a stream which is being captured and is associated with a different capture graph than the
    // event."
    if (stream->capture && stream->capture != capture) {
      invalidate(stream->capture);
      invalidate(capture);
      return refuse(kCaptureMerge, "a capture that waits for another one's event");
    }
    {
      Lock lock(tables);
      if (!captures.count(capture)) return refuse(kCapturedEvent, "an event of a capture that has ended");
    }
    // [guide] Cross-stream Dependencies and Events "When a captured event is waited on by a stream, it places the
    // stream in capture mode if it is not already, and the next item in the stream will have additional dependencies on
    // the nodes in the captured event."
    Lock lock(tables);
    stream->capture = capture;
    capture->blocking |= !stream->non_blocking;
    if (event->stream != stream) capture->joined[event->stream.get()] = true;
    capture->joined.insert({stream.get(), false});
    return kSuccess;
  }
  // [guide] Prohibited and Unhandled Operations "It is invalid to wait on a non-captured event from a stream which is
  // being captured without specifying the cudaEventWaitExternal flag."
  if (stream->capture) {
    invalidate(stream->capture);
    return refuse(kCaptureIsolation, "a capture that waits for an event recorded outside of it");
  }
  StreamRef other = event->stream;
  const std::uint64_t at = event->at;
  return push(stream, [=] { return other == stream ? kSuccess : run_until(other, at); });
}
