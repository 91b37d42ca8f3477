// Runs suites of the kernels of one ISA. stdin: lines "suite dtype edge". stdout: for each "ok", what is wrong, or "no
// such suite". test_kernels.py prepends includes: the description of the ISA, and the files of that ISA only.

#include <cstdio>
#include <string>

#include "formats.h"
#include "gemm.h"
#include "integers.h"
#include "packs.h"
#ifdef KT_BANDS
#include "bands.h"
#endif
#ifdef KT_AHEAD
#include "ahead.h"
#endif
#ifdef KT_TILES
#include "tiles.h"
#endif

namespace {

using Suite = std::string (*)(const Shape&);

template <template <class> class S>
Suite suite_of(const std::string& dtype) {
    using kt::bfloat16;
    using kt::float16;
    if (dtype == "float32") return S<float>::run;
    if (dtype == "bfloat16") return S<bfloat16>::run;
    if (dtype == "float16") return S<float16>::run;
    if constexpr (kt::KT_ISA::Isa::kVectorBytes == 16) {  // only scalar kernels compute in float64
        if (dtype == "float64") return S<double>::run;
    }
    return nullptr;
}

template <class S>
Suite suite_of(const std::string& dtype) {
    return dtype == "bytes" ? S::run : nullptr;
}

Suite find(const std::string& name, const std::string& dtype) {
#define KT_KERNEL(suite, function) \
    if (name == #suite) return suite_of<suites::suite>(dtype);
#ifdef KT_BANDS
#define KT_BAND_KERNEL KT_KERNEL
#else
#define KT_BAND_KERNEL(suite, function)
#endif
#ifdef KT_AHEAD
#define KT_AHEAD_KERNEL KT_KERNEL
#else
#define KT_AHEAD_KERNEL(suite, function)
#endif
#ifdef KT_TILES
#define KT_TILE_KERNEL KT_KERNEL
#else
#define KT_TILE_KERNEL(suite, function)
#endif
#include "kernels.def"
    return nullptr;
}

}  // namespace

int main() {
    [[maybe_unused]] const kt::KT_ISA::Isa::Region region{};
    char name[64], dtype[64], edge[64];
    while (scanf("%63s %63s %63s", name, dtype, edge) == 3) {
        const Suite suite = find(name, dtype);
        printf("%s\n", suite ? suite(Shape(edge)).c_str() : "no such suite");
        fflush(stdout);
    }
    return 0;
}
