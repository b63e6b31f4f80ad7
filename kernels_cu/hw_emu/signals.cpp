// Part of runtime.cpp: signals: a kernel's wild pointer becomes a report.

namespace {

const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
std::mutex signals_mutex;
i32 signals_users = 0;
struct sigaction signals_before[3];

void on_signal(int signal, siginfo_t* info, void* context) {
  Block* b = this_block;
  if (!b) {  // not ours: as if we had never been here
    for (i32 i = 0; i < 3; i++)
      if (kSignals[i] == signal) sigaction(signal, &signals_before[i], nullptr);
    return;
  }
  b->fault_signal = signal;
  b->fault_address = info->si_addr;
  b->fault_fiber = nullptr;
  u64 sp = 0;
#if defined(__linux__) && defined(__x86_64__)
  sp = static_cast<u64>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RSP]);
#elif defined(__linux__) && defined(__aarch64__)
  sp = static_cast<ucontext_t*>(context)->uc_mcontext.sp;
#else
  (void)context;
#endif
  for (i32 w = 0; w < b->warps; w++)
    for (Fiber* f : b->warp[w].fibers)
      if ((reinterpret_cast<u64>(f) & ~(emu::kStackBytes - 1)) == (sp & ~(emu::kStackBytes - 1))) b->fault_fiber = f;
  _longjmp(b->escape, 2);
}

struct SignalGuard {
  SignalGuard() {
    std::lock_guard<std::mutex> lock(signals_mutex);
    if (signals_users++) return;
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    for (i32 i = 0; i < 3; i++) sigaction(kSignals[i], &action, &signals_before[i]);
  }
  ~SignalGuard() {
    std::lock_guard<std::mutex> lock(signals_mutex);
    if (--signals_users) return;
    for (i32 i = 0; i < 3; i++) sigaction(kSignals[i], &signals_before[i], nullptr);
  }
};

// The stack on which a signal of this OS thread is handled.
struct SignalStack {
  stack_t before;
  explicit SignalStack(Arena* arena) {
    constexpr size_t kBytes = 64 * 1024;
    if (!arena->signal_stack) arena->signal_stack = malloc(kBytes);
    stack_t stack;
    memset(&stack, 0, sizeof(stack));
    stack.ss_sp = arena->signal_stack;
    stack.ss_size = kBytes;
    sigaltstack(&stack, &before);
  }
  ~SignalStack() { sigaltstack(&before, nullptr); }
};

}  // namespace
