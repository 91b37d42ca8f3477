// Executes AMX tile instructions where the CPU cannot or may not: preload it (ktops.testing.amx_emulator builds it).
//
//   KTOPS_AMX_EMULATOR_COUNTS=FILE   write the count of each instruction as JSON at exit; %p in FILE is the process id
//   KTOPS_AMX_EMULATOR_REFUSE=ERRNO  make requests for permission to use tiles fail with this error
//
// A tile instruction raises SIGILL on a CPU without AMX. On a CPU with AMX, it does so in a process that has no
// permission to use tile data. The emulator answers requests through libc's syscall() itself, so the process never gets
// permission. LDTILECFG, STTILECFG and TILERELEASE need no permission and do not trap on such a CPU. In the object that
// requests permission, they are therefore marked by a bit that makes them illegal. Elsewhere, e.g. in code generated at
// run time, they run on the CPU. The configuration is then read from the saved registers at the next instruction that
// traps, and counted there; a TILERELEASE is not counted.
// Linux gives a new thread its parent's configuration. Here it has none, since no program should rely on that.
// A process that makes the request with its own syscall instruction gets real tiles, and nothing is emulated or
// counted.

#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "decode.h"
#include "signals.h"
#include "tiles.h"

namespace amx {
namespace {

constexpr int kGetSupported = 0x1021, kGetPermission = 0x1022, kRequestPermission = 0x1023;  // arch_prctl
constexpr int kTileConfig = 17, kTileData = 18;                                              // state components

// The largest number of consecutive instructions executed in one trap.
constexpr int kBatch = 64;

std::atomic<uint64_t> counts[kNumOps];
std::atomic<bool> refused{false};
uint32_t config_offset = 0;  // offset of the tile configuration in saved registers; 0 if the CPU has none
thread_local TileFile tiles __attribute__((tls_model("initial-exec")));

long libc_syscall(long number, long a, long b, long c = 0, long d = 0, long e = 0, long f = 0) {
    static auto* function = next<long(long, ...)>("syscall");
    return function(number, a, b, c, d, e, f);
}

uint64_t segment_base(uint8_t prefix) {
    constexpr long kGetFs = 0x1003, kGetGs = 0x1004;
    uint64_t base = 0;
    libc_syscall(SYS_arch_prctl, prefix == 0x64 ? kGetFs : kGetGs, reinterpret_cast<long>(&base));
    return base;
}

// ---- marked code

struct Range {
    uintptr_t begin, end;
};
Range marked_ranges[16];
std::atomic<int> num_marked_ranges{0};

bool is_marked(uintptr_t address) {
    for (int i = 0; i < num_marked_ranges.load(std::memory_order_acquire); ++i) {
        if (address >= marked_ranges[i].begin && address < marked_ranges[i].end) return true;
    }
    return false;
}

void mark(uint8_t* instruction) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    uint8_t* byte = instruction + 2;
    void* start = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(byte) / page * page);
    if (mprotect(start, page, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
        std::perror("amx_emulator: cannot make configuration instructions trap: mprotect");
        std::abort();
    }
    *byte |= 4;
    mprotect(start, page, PROT_READ | PROT_EXEC);
}

// Marks LDTILECFG, STTILECFG and TILERELEASE in the executable segments of the object that contains `address`. They are
// found by their bytes, which occur elsewhere with a probability of about 2^-30 per byte.
int mark_object(dl_phdr_info* object, size_t, void* address) {
    const uintptr_t target = reinterpret_cast<uintptr_t>(address);
    const auto segment = [&](int i) {
        const uintptr_t begin = object->dlpi_addr + object->dlpi_phdr[i].p_vaddr;
        return Range{begin, begin + object->dlpi_phdr[i].p_memsz};
    };
    bool found = false;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        const Range r = segment(i);
        found |= object->dlpi_phdr[i].p_type == PT_LOAD && target >= r.begin && target < r.end;
    }
    for (int i = 0; found && i < object->dlpi_phnum; ++i) {
        const auto& header = object->dlpi_phdr[i];
        if (header.p_type != PT_LOAD || !(header.p_flags & PF_X)) continue;
        const Range r = segment(i);
        const int slot = num_marked_ranges.load();
        if (is_marked(r.begin) || slot == 16) continue;
        constexpr uintptr_t kLongest = 15;
        const Registers none = {{}, segment_base};
        for (uintptr_t at = r.begin; at + kLongest <= r.end; ++at) {
            auto* code = reinterpret_cast<uint8_t*>(at);
            if (*code != 0xc4) continue;
            Instruction instruction;
            if (Decoder(code, none, false).decode(instruction) && instruction.op <= TILERELEASE) mark(code);
        }
        marked_ranges[slot] = r;
        num_marked_ranges.store(slot + 1, std::memory_order_release);
    }
    return found;
}

// ---- signals

Registers registers_of(const ucontext_t& context) {
    constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    Registers r;
    for (int i = 0; i < 16; ++i) r.general[i] = static_cast<uint64_t>(context.uc_mcontext.gregs[order[i]]);
    r.segment_base = segment_base;
    return r;
}

// Moves a configuration that the CPU loaded itself to the emulator.
void take_native_config(ucontext_t& context) {
    auto* saved = reinterpret_cast<uint8_t*>(context.uc_mcontext.fpregs);
    if (!config_offset || !saved) return;
    constexpr uint32_t kMagic = 0x46505853;  // FP_XSTATE_MAGIC1: an XSAVE area follows the 512 legacy bytes
    uint32_t magic;
    uint64_t present;
    std::memcpy(&magic, saved + 464, sizeof magic);
    std::memcpy(&present, saved + 512, sizeof present);
    if (magic != kMagic || !(present >> kTileConfig & 1)) return;
    Fault fault;
    if (saved[config_offset] && tiles.load_config(saved + config_offset, fault)) counts[LDTILECFG].fetch_add(1);
    present &= ~(uint64_t{1} << kTileConfig);
    std::memcpy(saved + 512, &present, sizeof present);
}

void report(const Instruction& i, uintptr_t rip, const Fault& fault) {
    char text[1024];
    int n = std::snprintf(text, sizeof text, "amx_emulator: %s", kNames[i.op]);
    const auto append = [&](const char* format, auto... values) {
        if (n < static_cast<int>(sizeof text)) n += std::snprintf(text + n, sizeof text - n, format, values...);
    };
    const int operands[] = {i.dest, i.left, i.right};
    const int num_tiles = i.op < TILEZERO ? 0 : i.op < TDPBF16PS ? 1 : 3;
    for (int t = 0; t < num_tiles; ++t) append(t ? ", tmm%d" : " tmm%d", operands[t]);
    if (i.memory) append(" [0x%lx]", static_cast<unsigned long>(i.row(0)));
    append(" at rip 0x%lx", static_cast<unsigned long>(rip));
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(rip), &info) && info.dli_fname) {
        append(" (%s+0x%lx)", info.dli_fname,
               static_cast<unsigned long>(rip - reinterpret_cast<uintptr_t>(info.dli_fbase)));
    }
    append(" in thread %d: %s", static_cast<int>(libc_syscall(SYS_gettid, 0, 0)), fault.reason);
    for (int t = 0; t < num_tiles && tiles.configured(); ++t) {
        append("; tmm%d: %d rows of %d bytes", operands[t], tiles.rows(operands[t]), tiles.colsb(operands[t]));
    }
    append("\n");
    if (n > static_cast<int>(sizeof text)) n = sizeof text;
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text, static_cast<size_t>(n));
}

void raise_fault(const Fault& fault, siginfo_t* info, void* context) {
    if (fault.kind == Fault::kUndefined) return pass_on(program_action, SIGILL, info, context);
    struct sigaction action;
    libc_sigaction(SIGSEGV, nullptr, &action);
    siginfo_t general_protection = {};
    general_protection.si_signo = SIGSEGV;
    general_protection.si_code = SI_KERNEL;
    pass_on(action, SIGSEGV, &general_protection, context);
}

void on_illegal_instruction(int, siginfo_t* info, void* raw_context) {
    const int saved_errno = errno;
    auto& context = *static_cast<ucontext_t*>(raw_context);
    int executed = 0;
    if (info->si_code > 0) {
        take_native_config(context);
        const Registers registers = registers_of(context);
        auto& rip = context.uc_mcontext.gregs[REG_RIP];
        for (; executed < kBatch; ++executed) {
            const auto at = static_cast<uintptr_t>(rip);
            Instruction i;
            if (!Decoder(reinterpret_cast<const uint8_t*>(at), registers, is_marked(at)).decode(i)) break;
            Fault fault;
            if (refused && i.op >= TILEZERO) {
                fault.set(Fault::kUndefined, "the operating system refused permission to use tiles");
            } else if (tiles.execute(i, fault)) {
                counts[i.op].fetch_add(1, std::memory_order_relaxed);
                rip += i.length;
                continue;
            }
            if (executed) break;  // it traps by itself, with its own context
            report(i, at, fault);
            raise_fault(fault, info, raw_context);
            errno = saved_errno;
            return;
        }
    }
    if (!executed) pass_on(program_action, SIGILL, info, raw_context);
    errno = saved_errno;
}

// ---- permission

long permission(long request, long argument, void* caller) {
    if (request == kRequestPermission) {
        if (const char* error = std::getenv("KTOPS_AMX_EMULATOR_REFUSE")) {
            refused = true;
            errno = std::atoi(error);
            return -1;
        }
        dl_iterate_phdr(mark_object, caller);
        return 0;
    }
    auto* mask = reinterpret_cast<uint64_t*>(argument);
    const long result = libc_syscall(SYS_arch_prctl, request, argument);
    if (result != 0) *mask = 0;
    *mask |= uint64_t{3} << kTileConfig;
    if (request == kGetPermission && refused) *mask &= ~(uint64_t{1} << kTileData);
    return 0;
}

// ---- start and end

__attribute__((constructor)) void start() {
    unsigned size, offset, c, d;
    if (__get_cpuid_count(0xd, kTileConfig, &size, &offset, &c, &d) && size) config_offset = offset;
    install(on_illegal_instruction);
}

__attribute__((destructor)) void write_counts() {
    const char* path = std::getenv("KTOPS_AMX_EMULATOR_COUNTS");
    if (!path) return;
    std::string name = path;
    if (const size_t at = name.find("%p"); at != std::string::npos) name.replace(at, 2, std::to_string(getpid()));
    FILE* file = std::fopen(name.c_str(), "w");
    if (!file) return std::perror(("amx_emulator: " + name).c_str());
    std::fprintf(file, "{");
    for (int i = 0; i < kNumOps; ++i) {
        std::fprintf(file, "%s\"%s\": %lu", i ? ", " : "", kNames[i], static_cast<unsigned long>(counts[i].load()));
    }
    std::fprintf(file, "}\n");
    std::fclose(file);
}

}  // namespace
}  // namespace amx

extern "C" {

__attribute__((visibility("default"))) long syscall(long number, ...) noexcept {
    va_list arguments;
    va_start(arguments, number);
    long a[6];
    for (long& value : a) value = va_arg(arguments, long);
    va_end(arguments);
    const bool asks = number == SYS_arch_prctl && (a[0] == amx::kGetSupported || a[0] == amx::kGetPermission ||
                                                   (a[0] == amx::kRequestPermission && a[1] == amx::kTileData));
    if (asks) return amx::permission(a[0], a[1], __builtin_return_address(0));
    return amx::libc_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

// How often instruction `name` ran, in all threads so far; -1 if there is no such instruction.
__attribute__((visibility("default"))) int64_t amx_emulator_count(const char* name) {
    for (int i = 0; i < amx::kNumOps; ++i) {
        if (std::strcmp(name, amx::kNames[i]) == 0) return static_cast<int64_t>(amx::counts[i].load());
    }
    return -1;
}

}  // extern "C"
