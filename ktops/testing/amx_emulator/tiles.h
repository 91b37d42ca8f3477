#pragma once

// The tile registers of one thread and the operations on them: palette 1, eight tiles of at most 16 rows of 64 bytes.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, operation sections.

#include <immintrin.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "decode.h"

namespace amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// Why an instruction faults; empty if it does not.
struct Fault {
    enum Kind { kNone, kUndefined, kProtection } kind = kNone;  // #UD is SIGILL, #GP is SIGSEGV
    char reason[200] = "";

    __attribute__((format(printf, 3, 4))) bool set(Kind k, const char* format, ...) {
        kind = k;
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(reason, sizeof reason, format, arguments);
        va_end(arguments);
        return false;
    }
};

struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

using Row = uint8_t[kRowBytes];
struct alignas(64) Tile {
    Row row[kRows];
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

#if defined(__FMA__)

typedef float Vector __attribute__((vector_size(kLanes * 4)));

// In assembly, because the order of the operands determines which NaN results.
inline void fma(Vector& sum, Vector a, Vector b) { __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
inline void add(Vector& sum, Vector a) { __asm__("vaddps %1, %0, %0" : "+v"(sum) : "v"(a)); }

#else

struct Vector {
    float lane[kLanes];
};
inline void fma(Vector& sum, const Vector& a, const Vector& b) {
    for (int i = 0; i < kLanes; ++i) sum.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], sum.lane[i]);
}
inline void add(Vector& sum, const Vector& a) {
    for (int i = 0; i < kLanes; ++i) sum.lane[i] = sum.lane[i] + a.lane[i];
}

#endif

class TileFile {
public:
    // Executes the instruction. If it faults, returns false and the reason, and changes nothing.
    bool execute(const Instruction& i, Fault& fault) {
        switch (i.op) {
            case LDTILECFG:
                return load_config(reinterpret_cast<const void*>(i.row(0)), fault);
            case STTILECFG:
                std::memcpy(reinterpret_cast<void*>(i.row(0)), &config_, sizeof config_);
                return true;
            case TILERELEASE:
                release();
                return true;
            case TILEZERO:
                if (!valid(i.dest, fault)) return false;
                std::memset(&tile_[i.dest], 0, sizeof(Tile));
                break;
            case TILELOADD:
            case TILELOADDT1:
                if (!movable(i.dest, fault)) return false;
                load(i);
                break;
            case TILESTORED:
                if (!movable(i.dest, fault)) return false;
                store(i);
                break;
            default:
                if (!product_shapes(i, fault)) return false;
                i.op == TDPBF16PS ? bfloat16_product(i) : int8_product(i);
        }
        config_.start_row = 0;
        return true;
    }

    bool load_config(const void* from, Fault& fault) {
        Config c;
        std::memcpy(&c, from, sizeof c);
        if (c.palette == 0) {
            release();
            return true;
        }
        if (c.palette != 1) return fault.set(Fault::kProtection, "palette %d is neither 0 nor 1", c.palette);
        for (int j = 0; j < 14; ++j) {
            if (c.reserved[j]) return fault.set(Fault::kProtection, "reserved byte %d is not zero", 2 + j);
        }
        for (int t = 0; t < 16; ++t) {
            const int rows = c.rows[t], colsb = c.colsb[t];
            if (t >= kTiles && (rows || colsb)) return fault.set(Fault::kProtection, "tmm%d does not exist", t);
            if (rows > kRows) return fault.set(Fault::kProtection, "tmm%d has %d rows; the maximum is 16", t, rows);
            if (colsb > kRowBytes) {
                return fault.set(Fault::kProtection, "tmm%d has rows of %d bytes; the maximum is 64", t, colsb);
            }
            if (!rows != !colsb) {
                return fault.set(Fault::kProtection, "tmm%d has %d rows of %d bytes; one is zero", t, rows, colsb);
            }
        }
        release();
        config_ = c;
        return true;
    }

    bool configured() const { return config_.palette != 0; }
    int rows(int t) const { return config_.rows[t]; }
    int colsb(int t) const { return config_.colsb[t]; }
    int start_row() const { return config_.start_row; }

private:
    void release() {
        std::memset(&config_, 0, sizeof config_);
        std::memset(tile_, 0, sizeof tile_);
    }

    bool valid(int t, Fault& fault) const {
        if (!configured()) return fault.set(Fault::kUndefined, "no tiles are configured on this thread");
        return rows(t) || fault.set(Fault::kUndefined, "tmm%d is not configured", t);
    }

    bool movable(int t, Fault& fault) const {
        if (!valid(t, fault)) return false;
        if (colsb(t) % 4) return fault.set(Fault::kUndefined, "rows of tmm%d are not a multiple of 4 bytes", t);
        if (start_row() >= rows(t)) {
            return fault.set(Fault::kUndefined, "start_row %d is past the last row of tmm%d", start_row(), t);
        }
        return true;
    }

    // C [m][n] += A [m][k] . B [k][n] in groups of four bytes
    bool product_shapes(const Instruction& i, Fault& fault) const {
        const int c = i.dest, a = i.left, b = i.right;
        if (c == a || c == b || a == b) return fault.set(Fault::kUndefined, "the three tiles must differ");
        if (!valid(c, fault) || !valid(a, fault) || !valid(b, fault)) return false;
        if (colsb(c) % 4 || colsb(a) % 4 || colsb(b) % 4) {
            return fault.set(Fault::kUndefined, "rows of a tile are not a multiple of 4 bytes");
        }
        if (rows(c) != rows(a)) return fault.set(Fault::kUndefined, "tmm%d and tmm%d differ in rows", c, a);
        if (colsb(c) != colsb(b)) return fault.set(Fault::kUndefined, "tmm%d and tmm%d differ in columns", c, b);
        if (colsb(a) / 4 != rows(b)) {
            return fault.set(Fault::kUndefined, "tmm%d has %d columns of 4 bytes and tmm%d %d rows", a, colsb(a) / 4, b,
                             rows(b));
        }
        return true;
    }

    // No instruction reads a tile beyond its shape, and changing the shape clears it, so data there is never seen.
    void load(const Instruction& i) {
        Tile& tile = tile_[i.dest];
        const size_t bytes = static_cast<size_t>(colsb(i.dest));
        for (int r = start_row(); r < rows(i.dest); ++r) {
            std::memcpy(tile.row[r], reinterpret_cast<const void*>(i.row(r)), bytes);
        }
    }

    void store(const Instruction& i) const {
        const Tile& tile = tile_[i.dest];
        const size_t bytes = static_cast<size_t>(colsb(i.dest));
        for (int r = start_row(); r < rows(i.dest); ++r) {
            std::memcpy(reinterpret_cast<void*>(i.row(r)), tile.row[r], bytes);
        }
    }

    // Even and odd elements of k have separate sums, from zero, by fused multiply-adds in the order of k; then even +
    // odd is added to C. Denormals are zero and rounding is to nearest even, regardless of the program's MXCSR.
    void bfloat16_product(const Instruction& i) {
        constexpr unsigned kMasked = 0x1f80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
        const unsigned mxcsr = _mm_getcsr();
        _mm_setcsr(kMasked | kFlushToZero | kDenormalsAreZero);
        constexpr int kVectors = kRowBytes / 4 / kLanes;
        alignas(64) float even_b[kRows][kRowBytes / 4], odd_b[kRows][kRowBytes / 4];
        const int steps = colsb(i.left) / 4;
        for (int k = 0; k < steps; ++k) {
            widen(tile_[i.right].row[k], even_b[k], odd_b[k]);
        }
        for (int m = 0; m < rows(i.dest); ++m) {
            float even_a[kRowBytes / 4], odd_a[kRowBytes / 4];
            widen(tile_[i.left].row[m], even_a, odd_a);
            Vector even[kVectors] = {}, odd[kVectors] = {};
            for (int k = 0; k < steps; ++k) {
                const Vector ae = broadcast(even_a[k]), ao = broadcast(odd_a[k]);
                for (int v = 0; v < kVectors; ++v) {
                    fma(even[v], ae, vector_at(even_b[k] + v * kLanes));
                    fma(odd[v], ao, vector_at(odd_b[k] + v * kLanes));
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                uint8_t* c = tile_[i.dest].row[m] + v * sizeof(Vector);
                Vector sum;
                std::memcpy(&sum, c, sizeof sum);
                add(even[v], odd[v]);
                add(sum, even[v]);
                std::memcpy(c, &sum, sizeof sum);
            }
        }
        _mm_setcsr(mxcsr);
    }

    void int8_product(const Instruction& i) {
        const bool left_signed = i.op == TDPBSSD || i.op == TDPBSUD, right_signed = i.op == TDPBSSD || i.op == TDPBUSD;
        const auto value = [](uint8_t byte, bool is_signed) {
            return is_signed ? static_cast<int>(static_cast<int8_t>(byte)) : static_cast<int>(byte);
        };
        for (int m = 0; m < rows(i.dest); ++m) {
            uint32_t c[kRowBytes / 4];
            std::memcpy(c, tile_[i.dest].row[m], sizeof c);
            for (int k = 0; k < colsb(i.left); ++k) {
                const int a = value(tile_[i.left].row[m][k], left_signed);
                const uint8_t* b = tile_[i.right].row[k / 4] + k % 4;
                for (int n = 0; n < kRowBytes / 4; ++n)
                    c[n] += static_cast<uint32_t>(a * value(b[4 * n], right_signed));
            }
            std::memcpy(tile_[i.dest].row[m], c, sizeof c);
        }
    }

    static void widen(const Row& row, float* even, float* odd) {
        uint32_t pairs[kRowBytes / 4], low[kRowBytes / 4], high[kRowBytes / 4];
        std::memcpy(pairs, row, sizeof pairs);
        for (int n = 0; n < kRowBytes / 4; ++n) low[n] = pairs[n] << 16, high[n] = pairs[n] & 0xffff0000u;
        std::memcpy(even, low, sizeof low);
        std::memcpy(odd, high, sizeof high);
    }

    static Vector vector_at(const float* from) {
        Vector v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static Vector broadcast(float x) {
        float lanes[kLanes];
        for (float& lane : lanes) lane = x;
        return vector_at(lanes);
    }

    Config config_;
    Tile tile_[kTiles];
};

}  // namespace amx
