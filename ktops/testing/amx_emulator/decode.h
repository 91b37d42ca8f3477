#pragma once

// Decodes tile instructions. All of them are encoded as three-byte VEX, map 0F38, L = 0, W = 0:
//
//   [2e|36|3e|26|64|65|67]*  c4  RXB.00010  W.vvvv.L.pp  opcode  ModRM  [SIB]  [disp8|disp32]
//
//   opcode 49  pp none: LDTILECFG, TILERELEASE   66: STTILECFG     f2: TILEZERO
//          4b  pp 66:   TILELOADDT1              f2: TILELOADD     f3: TILESTORED     (always with a SIB)
//          5c  pp f3:   TDPBF16PS
//          5e  pp none: TDPBUUD   66: TDPBUSD    f3: TDPBSUD       f2: TDPBSSD

#include <cstdint>
#include <cstring>

namespace amx {

enum Op : uint8_t {
    LDTILECFG,
    STTILECFG,
    TILERELEASE,
    TILEZERO,
    TILELOADD,
    TILELOADDT1,
    TILESTORED,
    TDPBF16PS,
    TDPBSSD,
    TDPBSUD,
    TDPBUSD,
    TDPBUUD,
    kNumOps
};

inline constexpr const char* kNames[kNumOps] = {"ldtilecfg", "sttilecfg",   "tilerelease", "tilezero",
                                                "tileloadd", "tileloaddt1", "tilestored",  "tdpbf16ps",
                                                "tdpbssd",   "tdpbsud",     "tdpbusd",     "tdpbuud"};

// The registers in an address: general registers by their number in ModRM, rax = 0 ... r15 = 15.
struct Registers {
    uint64_t general[16];
    uint64_t (*segment_base)(uint8_t prefix);  // of fs (64) or gs (65)
};

struct Instruction {
    Op op;
    int length;             // bytes, prefixes included
    int dest, left, right;  // tile registers; left and right of products only
    bool memory;
    uint64_t address;  // of the first row
    uint64_t stride;   // from row to row
    uint64_t mask;     // of addresses: 32 bits with the address-size prefix
    uint64_t segment;  // added last
    uint64_t row(int i) const { return ((address + static_cast<uint64_t>(i) * stride) & mask) + segment; }
};

// LDTILECFG, STTILECFG and TILERELEASE with L set are invalid on every CPU. Setting L in a program's code makes them
// trap on CPUs with AMX (emulator.cpp). With `marked`, they are decoded as if L were clear.
class Decoder {
public:
    Decoder(const uint8_t* code, const Registers& registers, bool marked)
        : start_(code), code_(code), registers_(registers), marked_(marked) {}

    // False if the bytes are not a tile instruction with valid operands. Reads no byte past the instruction.
    bool decode(Instruction& out) {
        out = {};
        out.mask = ~uint64_t{0};
        if (!prefixes(out) || *code_++ != 0xc4) return false;
        const uint8_t second = *code_++, third = *code_++;
        r_ = !(second & 0x80), x_ = !(second & 0x40), b_ = !(second & 0x20);
        const bool w = third & 0x80, l = third & 4;
        vvvv_ = ~third >> 3 & 15, pp_ = third & 3;
        if ((second & 31) != 2 || w) return false;
        const uint8_t opcode = *code_++;
        if (l && !(marked_ && opcode == 0x49)) return false;
        if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e) return false;
        const uint8_t modrm = *code_++;
        mod_ = modrm >> 6, reg_ = modrm >> 3 & 7, rm_ = modrm & 7;
        if (!operation(opcode, out) || (l && out.op == TILEZERO)) return false;
        out.length = static_cast<int>(code_ - start_);
        if (rip_relative_) out.address = (out.address + reinterpret_cast<uint64_t>(code_)) & out.mask;
        return true;
    }

private:
    enum { kNone, k66, kF3, kF2 };

    bool prefixes(Instruction& out) {
        for (;; ++code_) {
            switch (*code_) {
                case 0x64:
                case 0x65:
                    out.segment = registers_.segment_base(*code_);
                    break;
                case 0x26:
                case 0x2e:
                case 0x36:
                case 0x3e:
                    break;
                case 0x67:
                    out.mask = 0xffffffff;
                    break;
                default:
                    return code_ - start_ <= 11;
            }
        }
    }

    bool operation(uint8_t opcode, Instruction& out) {
        const bool is_register = mod_ == 3;
        out.dest = reg_;
        if (opcode == 0x5c || opcode == 0x5e) {
            if (!is_register || r_ || b_ || vvvv_ > 7) return false;
            constexpr Op int8[] = {TDPBUUD, TDPBUSD, TDPBSUD, TDPBSSD};
            out.op = opcode == 0x5c ? TDPBF16PS : int8[pp_];
            out.left = rm_, out.right = vvvv_;
            return opcode == 0x5e || pp_ == kF3;
        }
        if (r_ || vvvv_ != 0) return false;
        if (opcode == 0x4b) {
            constexpr Op move[] = {kNumOps, TILELOADDT1, TILESTORED, TILELOADD};
            out.op = move[pp_];
            return pp_ != kNone && !is_register && rm_ == 4 && address(out);
        }
        if (is_register) {
            out.op = pp_ == kF2 ? TILEZERO : TILERELEASE;
            return rm_ == 0 && (pp_ == kF2 || (pp_ == kNone && reg_ == 0));
        }
        out.op = pp_ == kNone ? LDTILECFG : STTILECFG;
        return (pp_ == kNone || pp_ == k66) && reg_ == 0 && address(out);
    }

    bool address(Instruction& out) {
        out.memory = true;
        const bool tile = out.op >= TILELOADD;
        bool has_base = true;
        int base = rm_ | b_ << 3;
        if (rm_ == 4) {
            const uint8_t sib = *code_++;
            const int index = (sib >> 3 & 7) | x_ << 3;
            const uint64_t scaled = index == 4 ? 0 : registers_.general[index] << (sib >> 6);
            base = (sib & 7) | b_ << 3;
            has_base = (sib & 7) != 5 || mod_ != 0;
            (tile ? out.stride : out.address) = scaled;
        } else if (rm_ == 5 && mod_ == 0) {
            has_base = false;
            rip_relative_ = true;
        }
        if (has_base) out.address += registers_.general[base];
        if (mod_ == 1) {
            out.address += static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(*code_++)));
        } else if (mod_ == 2 || !has_base) {
            int32_t displacement;
            std::memcpy(&displacement, code_, 4);
            code_ += 4;
            out.address += static_cast<uint64_t>(static_cast<int64_t>(displacement));
        }
        return true;
    }

    const uint8_t *start_, *code_;
    const Registers& registers_;
    bool marked_, rip_relative_ = false;
    int r_ = 0, x_ = 0, b_ = 0, vvvv_ = 0, pp_ = 0, mod_ = 0, reg_ = 0, rm_ = 0;
};

}  // namespace amx
