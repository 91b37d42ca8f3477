#include "isa/cpu_features.h"

#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace kt::cpu {
namespace {

struct Leaf {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
    Leaf r;
    if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
    return r;
}

bool bit(uint32_t word, int i) { return (word >> i) & 1; }

// The registers that the operating system saves at a context switch.
uint64_t xcr0() {
    if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

constexpr uint64_t kYmmState = 0x06;  // xmm, ymm
constexpr uint64_t kZmmState = 0xe6;  // xmm, ymm, opmask, upper halves of zmm0-15, zmm16-31

constexpr uint64_t kTileState = 0x60000;  // tile configuration, tile data

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

bool cpu_has_tiles() {
    const Leaf seven = cpuid(7, 0);
    return bit(seven.edx, 22) && bit(seven.edx, 24) && bit(seven.edx, 25);  // AMX-BF16, AMX-TILE, AMX-INT8
}

// 0 or errno
int request_tiles() { return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno; }

}  // namespace

bool has_scalar() { return true; }

bool has_avx2() {
    const Leaf one = cpuid(1, 0), seven = cpuid(7, 0);
    const bool fma = bit(one.ecx, 12), f16c = bit(one.ecx, 29);
    const bool avx2 = bit(seven.ebx, 5), bmi = bit(seven.ebx, 3) && bit(seven.ebx, 8);
    return (xcr0() & kYmmState) == kYmmState && fma && f16c && avx2 && bmi;
}

bool has_avx512() {
    const Leaf seven = cpuid(7, 0);
    const bool avx512 =
        bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);  // F DQ BW VL
    return has_avx2() && (xcr0() & kZmmState) == kZmmState && avx512;
}

bool has_avx512_bf16() { return has_avx512() && bit(cpuid(7, 1).eax, 5) && bit(cpuid(7, 0).ecx, 11); }  // and VNNI

bool has_avx512_vbmi() { return has_avx512() && bit(cpuid(7, 0).ecx, 1); }

bool slow_bfloat16_dot() {
    constexpr uint32_t kCooperLake = 0x55;
    const Leaf zero = cpuid(0, 0), one = cpuid(1, 0);
    const bool intel = zero.ebx == 0x756e6547 && zero.edx == 0x49656e69 && zero.ecx == 0x6c65746e;  // "GenuineIntel"
    const uint32_t model = ((one.eax >> 16) & 0xf) << 4 | ((one.eax >> 4) & 0xf);
    return intel && model != kCooperLake;
}

bool has_amx_bf16() { return has_avx512_bf16() && cpu_has_tiles() && tiles_refused().empty(); }

std::string tiles_refused() {
    if (!has_avx512_bf16() || !cpu_has_tiles()) return {};
    if ((xcr0() & kTileState) != kTileState) {
        return "this CPU has AMX, but the operating system does not save tile registers (Linux does since 5.16)";
    }
    static const int error = request_tiles();
    if (error == 0) return {};
    return "this CPU has AMX, but the operating system refused permission to use it (arch_prctl: " +
           std::string(std::strerror(error)) + ", errno " + std::to_string(error) + ")";
}

}  // namespace kt::cpu
