#include "dispatch/table.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "core/environment.h"
#include "isa/cpu_features.h"

namespace kt::dispatch {
namespace {

using Rows = std::vector<const IsaRow*>;

// In the order of isa/rows.def, unless the CPU multiplies bfloat16 slowly.
Rows best_first() {
    Rows list = {
#define KT_ROW(name) &name##_row,
#include "isa/rows.def"
#undef KT_ROW
    };
    if (cpu::slow_bfloat16_dot()) {
        std::iter_swap(std::find(list.begin(), list.end(), &avx512_bf16_row),
                       std::find(list.begin(), list.end(), &avx512_row));
    }
    return list;
}

const Rows& rows() {
    static const Rows list = best_first();
    return list;
}

std::atomic<const IsaRow*> chosen{nullptr};

std::string names() {
    std::string list;
    for (const IsaRow* row : rows()) list += (list.empty() ? "" : ", ") + std::string(row->name);
    return list;
}

std::string refusal(const IsaRow& row) { return row.refused ? row.refused() : std::string(); }

const IsaRow* first_choice() {
    const std::string name = environment::isa();
    if (!name.empty()) return &find(name, "KTOPS_ISA");
    for (const IsaRow* row : rows()) {
        if (row->supported()) return row;
    }
    return &scalar_row;
}

}  // namespace

const IsaRow& find(const std::string& name, const char* argument) {
    for (const IsaRow* row : rows()) {
        if (name != row->name) continue;
        if (row->supported() || environment::isa_unchecked()) return *row;
        const std::string reason = refusal(*row), got = ", got '" + name + "'";
        if (!reason.empty()) {
            throw std::runtime_error(std::string(argument) + " must be an ISA that can run here" + got + ": " + reason);
        }
        throw std::runtime_error(std::string(argument) + " must be supported by this CPU (" + describe() + ")" + got);
    }
    throw std::runtime_error(std::string(argument) + " must be one of " + names() + ", got '" + name + "'");
}

const IsaRow& current() {
    const IsaRow* row = chosen.load(std::memory_order_acquire);
    if (!row) {
        row = first_choice();
        chosen.store(row, std::memory_order_release);
    }
    return *row;
}

void use(const std::string& name) { chosen.store(&find(name, "name"), std::memory_order_release); }

std::string describe() {
    std::string list;
    for (const IsaRow* row : rows()) {
        list += (list.empty() ? "" : ",") + std::string(row->name) + "=" + (row->supported() ? "1" : "0");
    }
    return list;
}

std::string refused() {
    std::string list;
    if (!environment::isa().empty()) return list;
    for (const IsaRow* row : rows()) {
        if (row->supported()) break;
        const std::string reason = refusal(*row);
        if (!reason.empty()) list += (list.empty() ? "" : "; ") + std::string(row->name) + ": " + reason;
    }
    return list;
}

}  // namespace kt::dispatch
