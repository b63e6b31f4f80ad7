// Capture, and graphs. A graph's nodes run in the order in which they were recorded.
#include "state.hpp"

std::set<std::shared_ptr<Capture>> captures;

static thread_local int mode_here = 0;  // 0 global, 1 thread local, 2 relaxed

API int cuThreadExchangeStreamCaptureMode(int* mode) {
  if (*mode < 0 || *mode > 2) return refuse(kInvalidValue, "no such capture mode");
  std::swap(*mode, mode_here);
  return kSuccess;
}

// [guide] Invalidation "When an invalid operation is attempted during stream capture, any associated capture graphs are
// invalidated. When a capture graph is invalidated, further use of any streams which are being captured or captured
// events associated with the graph is invalid and will return an error, until stream capture is ended".
void invalidate(const std::shared_ptr<Capture>& capture) { capture->invalid = true; }

// [driver] cuThreadExchangeStreamCaptureMode, CU_STREAM_CAPTURE_MODE_GLOBAL: "If the local thread has an ongoing
// capture sequence that was not initiated with CU_STREAM_CAPTURE_MODE_RELAXED at cuStreamBeginCapture, or if any other
// thread has a concurrent capture sequence initiated with CU_STREAM_CAPTURE_MODE_GLOBAL, this thread is prohibited from
// potentially unsafe API calls." ..._THREAD_LOCAL: "Concurrent capture sequences in other threads are ignored."
// ..._RELAXED: "The local thread is not prohibited from potentially unsafe API calls."
Status unsafe(const char* call) {
  if (mode_here == 2) return kSuccess;
  Lock lock(tables);
  bool prohibited = false;
  for (auto& capture : captures) {
    const bool mine = capture->thread == std::this_thread::get_id();
    if (mine ? capture->mode != 2 : capture->mode == 0 && mode_here == 0) {
      invalidate(capture);
      prohibited = true;
    }
  }
  return prohibited ? refuse(kCaptureUnsupported, call) : kSuccess;
}

// [guide] Prohibited and Unhandled Operations "When any stream in the same context is being captured, and it was not
// created with cudaStreamNonBlocking, any attempted use of the legacy stream is invalid."
Status legacy_use(const StreamRef& stream, const char* call) {
  if (!stream->legacy) return kSuccess;
  Lock lock(tables);
  for (auto& capture : captures)
    if (capture->blocking && capture->origin->context == stream->context) {
      invalidate(capture);
      return refuse(kCaptureImplicit, call);
    }
  return kSuccess;
}

// [guide] Prohibited and Unhandled Operations "It is also invalid to query the execution status of or synchronize a
// broader handle which encompasses an active stream capture, such as a device or context handle when any associated
// stream is in capture mode."
Status encompasses(Context* context, const char* call) {
  Lock lock(tables);
  bool captured = false;
  for (auto& capture : captures)
    if (capture->origin->context == context) {
      invalidate(capture);
      captured = true;
    }
  return captured ? refuse(kCaptureUnsupported, call) : kSuccess;
}

Status record(const StreamRef& stream, Work work) {
  Lock lock(tables);
  Capture& capture = *stream->capture;
  if (capture.invalid) return refuse(kCaptureInvalidated, "work of a capture that an earlier call made invalid");
  capture.graph->nodes.push_back(std::move(work));
  capture.joined[stream.get()] = false;
  return kSuccess;
}

API int cuStreamBeginCapture_v2(Handle handle, int mode) {
  REQUIRE(in_context());
  StreamRef stream = stream_of(handle);
  if (!stream) return refuse(kInvalidHandle, "cuStreamBeginCapture");
  // [driver] cuStreamBeginCapture "Capture may not be initiated if stream is CU_STREAM_LEGACY. Capture must be ended on
  // the same stream in which it was initiated, and it may only be initiated if the stream is not already in capture
  // mode."
  if (stream->legacy) return refuse(kCaptureUnsupported, "capture of the legacy stream");
  if (stream->capture) return refuse(kInvalidValue, "capture of a stream that is captured already");
  Lock lock(tables);
  auto capture = std::make_shared<Capture>();
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->origin = stream.get();
  capture->blocking = !stream->non_blocking;
  capture->graph = new Graph;
  stream->capture = capture;
  captures.insert(capture);
  note("begin capture mode=%d", mode);
  return kSuccess;
}

static Status ended(const Capture& capture, const Stream* stream) {
  // [driver] cuStreamEndCapture "If capture was invalidated, due to a violation of the rules of stream capture, then a
  // NULL graph will be returned."
  if (capture.invalid) return refuse(kCaptureInvalidated, "cuStreamEndCapture");
  if (capture.origin != stream) return refuse(kCaptureUnmatched, "cuStreamEndCapture of another stream");
  // [guide] Cross-stream Dependencies and Events "Any other streams which are being captured to the same capture graph,
  // due to event-based dependencies, must also be joined back to the origin stream."
  for (auto& [other, joined] : capture.joined)
    if (other != capture.origin && !joined) return refuse(kCaptureUnjoined, "cuStreamEndCapture");
  return kSuccess;
}

API int cuStreamEndCapture(Handle handle, Graph** graph) {
  REQUIRE(in_context());
  *graph = nullptr;
  StreamRef stream = stream_of(handle);
  if (!stream || !stream->capture) return refuse(kInvalidValue, "cuStreamEndCapture of no capture");
  auto capture = stream->capture;
  // [driver] cuStreamEndCapture "If the mode argument to cuStreamBeginCapture was not CU_STREAM_CAPTURE_MODE_RELAXED,
  // this call must be from the same thread as cuStreamBeginCapture."
  if (capture->mode != 2 && capture->thread != std::this_thread::get_id())
    return refuse(kCaptureWrongThread, "cuStreamEndCapture");
  Lock lock(tables);
  Status status = ended(*capture, stream.get());
  captures.erase(capture);
  for (auto& [other, joined] : capture->joined) other->capture = nullptr;
  stream->capture = nullptr;
  if (!status) *graph = capture->graph;
  note("graph of %zu nodes", capture->graph->nodes.size());
  return status;
}

// [driver] cuStreamIsCapturing "Note that, if this is called on CU_STREAM_LEGACY (the "null stream") while a blocking
// stream in the same context is capturing, it will return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT and *captureStatus is
// unspecified after the call. The blocking stream capture is not invalidated."
API int cuStreamIsCapturing(Handle handle, int* state) {
  REQUIRE(in_context());
  StreamRef stream = stream_of(handle);
  if (!stream) return refuse(kInvalidHandle, "cuStreamIsCapturing");
  Lock lock(tables);
  if (stream->legacy)
    for (auto& capture : captures)
      if (capture->blocking && capture->origin->context == stream->context)
        return refuse(kCaptureImplicit, "cuStreamIsCapturing of the legacy stream");
  *state = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  return kSuccess;
}

API int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
  REQUIRE(ready());
  if (!graph) return refuse(kInvalidValue, "cuGraphInstantiate of no graph");
  *executable = new Graph(*graph);
  return kSuccess;
}

API int cuGraphLaunch(Graph* executable, Handle handle) {
  REQUIRE(in_context());
  StreamRef stream = stream_of(handle);
  if (!stream || !executable) return refuse(kInvalidHandle, "cuGraphLaunch");
  // The launch of a graph into a stream that is captured: drivers have refused it.
  if (stream->capture) {
    invalidate(stream->capture);
    return refuse(kCaptureUnsupported, "cuGraphLaunch");
  }
  note("graph launch of %zu nodes", executable->nodes.size());
  for (auto& node : executable->nodes) REQUIRE(push(stream, node));
  return kSuccess;
}

API int cuGraphDestroy(Graph* graph) {
  delete graph;
  return kSuccess;
}

API int cuGraphExecDestroy(Graph* graph) {
  delete graph;  // what it launched is in its stream's queue
  return kSuccess;
}
