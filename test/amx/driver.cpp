// Runs one case in assembly, or one of the scenarios below, on an arena of memory that is read from stdin and written
// to stdout. The same program runs natively and under the emulator.

#include <errno.h>
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#pragma GCC target("amx-tile,amx-bf16")

extern "C" {
extern void (*const cases[])(uint8_t* arena);  // written by the test
}

namespace {

constexpr uintptr_t kArena = 0x60000000;  // within 31 bits, above the gigabyte where Linux places the heap
constexpr size_t kArenaBytes = 256 << 10;
constexpr long kSetGs = 0x1001, kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;

struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t colsb[16] = {};
    uint8_t rows[16] = {};
};

// Thread i keeps i + 1 rows of i + 1 dwords of value i in tile 7, while all other threads do the same with theirs.
constexpr int kThreads = 8;
pthread_barrier_t barrier;

void* one_thread(void* argument) {
    const auto i = reinterpret_cast<intptr_t>(argument);
    Config config;
    config.rows[7] = static_cast<uint8_t>(i + 1);
    config.colsb[7] = static_cast<uint16_t>(4 * (i + 1));
    auto* part = reinterpret_cast<uint8_t*>(kArena) + i * 4096;
    std::memset(part, static_cast<int>(i), 1024);
    std::memset(part + 1024, 0xff, 1024);
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&config);
    pthread_barrier_wait(&barrier);
    _tile_loadd(7, part, 64);
    for (int n = 0; n < 20; ++n) {
        pthread_barrier_wait(&barrier);
        _tile_stored(7, part + 1024, 64);
    }
    pthread_barrier_wait(&barrier);
    _tile_release();
    return nullptr;
}

void threads() {
    pthread_barrier_init(&barrier, nullptr, kThreads);
    pthread_t ids[kThreads];
    for (intptr_t i = 0; i < kThreads; ++i) pthread_create(&ids[i], nullptr, one_thread, reinterpret_cast<void*>(i));
    for (pthread_t id : ids) pthread_join(id, nullptr);
}

void* zero_a_tile(void*) {
    pthread_barrier_wait(&barrier);
    _tile_zero(0);
    return nullptr;
}

// A thread without a tile configuration uses a tile while another thread has one. On Linux a new thread inherits its
// parent's, so the parent configures its tiles later.
void foreign_tiles() {
    pthread_barrier_init(&barrier, nullptr, 2);
    pthread_t id;
    pthread_create(&id, nullptr, zero_a_tile, nullptr);
    Config config;
    config.rows[0] = 1, config.colsb[0] = 4;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&config);
    pthread_barrier_wait(&barrier);
    pthread_join(id, nullptr);
}

// The program's own handler skips ud2 and a tile instruction that faults.
volatile sig_atomic_t handled = 0;

void step_over(int, siginfo_t*, void* context) {
    auto& rip = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
    rip += *reinterpret_cast<const uint8_t*>(rip) == 0x0f ? 2 : 5;
    handled = handled + 1;
}

void own_handler() {
    struct sigaction action = {}, old = {};
    action.sa_sigaction = step_over;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &old);
    const bool was_default = old.sa_handler == SIG_DFL;
    Config config;
    config.rows[0] = 1, config.colsb[0] = 4;
    __asm__ volatile("ud2" ::: "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_stored(0, reinterpret_cast<void*>(kArena), 64);
    _tile_zero(5);
    sigaction(SIGILL, nullptr, &old);
    std::printf("%d %d %d\n", was_default, static_cast<int>(handled), old.sa_sigaction == step_over);
    std::printf("%d\n", reinterpret_cast<void*>(signal(SIGILL, SIG_DFL)) == reinterpret_cast<void*>(step_over));
}

void permission() {
    uint64_t mask = 0;
    const long result = syscall(SYS_arch_prctl, kRequestPermission, kTileData);
    const int error = result ? errno : 0;
    syscall(SYS_arch_prctl, kGetPermission, &mask);
    uint64_t real_mask = 0;
    long real_result = SYS_arch_prctl;
    __asm__ volatile("syscall" : "+a"(real_result) : "D"(kGetPermission), "S"(&real_mask) : "rcx", "r11", "memory");
    const int has = static_cast<int>(mask >> kTileData & 1), really = static_cast<int>(real_mask >> kTileData & 1);
    std::printf("%ld %d %d %d\n", result, error, has, really);
    std::fflush(stdout);
    Config config;
    config.rows[0] = 1, config.colsb[0] = 4;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
}

void scenario(const char* name) {
    if (!std::strcmp(name, "threads")) return threads();
    if (!std::strcmp(name, "foreign_tiles")) return foreign_tiles();
    if (!std::strcmp(name, "own_handler")) return own_handler();
    cases[std::atoi(name)](reinterpret_cast<uint8_t*>(kArena));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    if (!std::strcmp(argv[1], "permission")) return permission(), 0;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 3;
    void* arena = mmap(reinterpret_cast<void*>(kArena), kArenaBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (reinterpret_cast<uintptr_t>(arena) != kArena) return 4;
    for (size_t n = 0; n < kArenaBytes;) {
        const ssize_t got = read(STDIN_FILENO, reinterpret_cast<uint8_t*>(arena) + n, kArenaBytes - n);
        if (got <= 0) break;
        n += static_cast<size_t>(got);
    }
    syscall(SYS_arch_prctl, kSetGs, kArena);
    scenario(argv[1]);
    std::fflush(stdout);
    return std::fwrite(arena, 1, kArenaBytes, stdout) == kArenaBytes ? 0 : 5;
}
