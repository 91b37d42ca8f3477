#pragma once

// Keeps the program's own SIGILL handler while the emulator's is installed. sigaction() and signal() replace libc's, so
// that a handler that the program installs later (Python's faulthandler) does not displace the emulator's. It receives
// the signals that do not concern the emulator.

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <cstring>

namespace amx {

template <class F>
F* next(const char* name) {
    return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

inline int libc_sigaction(int number, const struct sigaction* action, struct sigaction* old) {
    static auto* function = next<int(int, const struct sigaction*, struct sigaction*)>("sigaction");
    return function(number, action, old);
}

inline struct sigaction program_action;  // for SIGILL
inline bool installed = false;

inline void install(void (*handler)(int, siginfo_t*, void*)) {
    struct sigaction action = {};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    libc_sigaction(SIGILL, &action, &program_action);
    installed = true;
}

// Handles a signal as it would be handled without the emulator. A fault with the default action is raised again by the
// instruction itself when the handler returns to it.
inline void pass_on(const struct sigaction& action, int number, siginfo_t* info, void* context) {
    const bool fault = info->si_code > 0;
    const bool ignored = !(action.sa_flags & SA_SIGINFO) && action.sa_handler == SIG_IGN;
    if (ignored && !fault) return;
    if (ignored || action.sa_handler == SIG_DFL) {
        struct sigaction standard = {};
        standard.sa_handler = SIG_DFL;
        libc_sigaction(number, &standard, nullptr);
        if (!fault || number != SIGILL) raise(number);
        return;
    }
    const auto handler = action;
    if (action.sa_flags & SA_RESETHAND && number == SIGILL) program_action = {};
    sigset_t blocked = handler.sa_mask;
    if (!(handler.sa_flags & SA_NODEFER)) sigaddset(&blocked, number);
    pthread_sigmask(SIG_BLOCK, &blocked, nullptr);  // until the return from the emulator's handler
    if (handler.sa_flags & SA_SIGINFO) {
        handler.sa_sigaction(number, info, context);
    } else {
        handler.sa_handler(number);
    }
}

}  // namespace amx

extern "C" {

__attribute__((visibility("default"))) int sigaction(int number, const struct sigaction* action,
                                                     struct sigaction* old) noexcept {
    if (number != SIGILL || !amx::installed) return amx::libc_sigaction(number, action, old);
    const struct sigaction before = amx::program_action;
    if (action) amx::program_action = *action;
    if (old) *old = before;
    return 0;
}

__attribute__((visibility("default"))) sighandler_t signal(int number, sighandler_t handler) noexcept {
    struct sigaction action = {}, old = {};
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;
    if (sigaction(number, &action, &old) != 0) return SIG_ERR;
    return old.sa_handler;
}

}  // extern "C"
