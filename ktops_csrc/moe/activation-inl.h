#pragma once

// Activations and their derivatives, on vectors.

#include <type_traits>

#include "isa/math-inl.h"
#include "moe/problem.h"

namespace kt::KT_ISA {

template <class A>
struct Act {
    Vec<A> value, derivative;
};

// h and its derivatives with respect to g and u.
template <class A>
struct Gate {
    Vec<A> h, dg, du;
};

template <class A>
inline Vec<A> sigmoid(Vec<A> x) {
    return A{1} / (A{1} + exp(-x));
}

struct Silu {
    // act = g s, act' = s (1 + g (1 - s)), s = 1 / (1 + e^-g)
    template <class A>
    static Act<A> act(Vec<A> g) {
        const Vec<A> s = sigmoid<A>(g);
        return {g * s, s * (A{1} + g * (A{1} - s))};
    }
};

struct Gelu {
    // act = g P, act' = P + g p: P and p the distribution function and density of the normal distribution
    template <class A>
    static Act<A> act(Vec<A> g) {
        const Vec<A> x = g * static_cast<A>(0.70710678118654752440);
        const Vec<A> gauss = exp(-x * x);
        const Vec<A> cdf = A{0.5} + A{0.5} * erf(x, gauss);
        return {g * cdf, cdf + g * gauss * static_cast<A>(0.39894228040143267794)};
    }
};

struct GeluTanh {
    // act = g s, s = 1 / (1 + e^-2z), z = sqrt(2/pi) (g + 0.044715 g^3): the same as 0.5 g (1 + tanh z)
    template <class A>
    static Act<A> act(Vec<A> g) {
        const A c = static_cast<A>(2 * 0.79788456080286535588), d = static_cast<A>(0.044715);
        const Vec<A> s = sigmoid<A>(c * g * (A{1} + d * g * g));
        return {g * s, s + g * s * (A{1} - s) * c * (A{1} + 3 * d * g * g)};
    }
};

struct Relu {
    template <class A>
    static Act<A> act(Vec<A> g) {
        const Vec<A> zero{}, one = broadcast(A{1});
        return {g < zero ? zero : g, g > zero ? one : zero};
    }
};

struct Relu2 {
    // act = max(g, 0)^2
    template <class A>
    static Act<A> act(Vec<A> g) {
        const Vec<A> zero{}, r = g < zero ? zero : g;
        return {r * r, A{2} * r};
    }
};

struct Sigmoid {
    template <class A>
    static Act<A> act(Vec<A> g) {
        const Vec<A> s = sigmoid<A>(g);
        return {s, s * (A{1} - s)};
    }
};

// x clamped to [-limit, limit]. At the limits the derivative is 1, as in PyTorch.
template <class A>
inline Act<A> clamp(Vec<A> x, A limit) {
    const Vec<A> high = broadcast(limit), low = -high, zero{}, one = broadcast(A{1});
    const Vec<A> value = x > high ? high : x;
    return {value < low ? low : value, x > high ? zero : x < low ? zero : one};
}

// cap tanh(x / cap)
template <class A>
inline Act<A> softcap(Vec<A> x, A cap) {
    const Vec<A> t = tanh(x / cap);
    return {cap * t, A{1} - t * t};
}

class SwigluClamped {
public:
    explicit SwigluClamped(const double* args) : limit_(args[0]), alpha_(args[1]), offset_(args[2]) {}

    // h = g' s (u' + offset), g' = min(g, limit), u' = u in [-limit, limit], s = 1 / (1 + e^(-alpha g'))
    template <class A>
    Gate<A> gate(Vec<A> g, Vec<A> u) const {
        const A alpha = static_cast<A>(alpha_), limit = static_cast<A>(limit_);
        const Vec<A> high = broadcast(limit), zero{};
        const Vec<A> low_g = g > high ? high : g;
        const Act<A> up = clamp<A>(u, limit);
        const Vec<A> s = sigmoid<A>(alpha * low_g), value = low_g * s, factor = up.value + static_cast<A>(offset_);
        const Vec<A> derivative = s * (A{1} + alpha * low_g * (A{1} - s));
        return {value * factor, factor * (g > high ? zero : derivative), value * up.derivative};
    }

private:
    double limit_, alpha_, offset_;
};

class SwigluStep {
public:
    explicit SwigluStep(const double* args) : limit_(args[0]) {}

    // h = min(g s, limit) u', u' = u in [-limit, limit], s = 1 / (1 + e^-g)
    template <class A>
    Gate<A> gate(Vec<A> g, Vec<A> u) const {
        const A limit = static_cast<A>(limit_);
        const Vec<A> high = broadcast(limit), zero{};
        const Act<A> silu = Silu::act<A>(g), up = clamp<A>(u, limit);
        const Vec<A> value = silu.value > high ? high : silu.value;
        return {value * up.value, up.value * (silu.value > high ? zero : silu.derivative), value * up.derivative};
    }

private:
    double limit_;
};

class SwigluSoftcapped {
public:
    explicit SwigluSoftcapped(const double* args) : gate_softcap_(args[0]), up_softcap_(args[1]) {}

    // h = g' s u', g' = c tanh(g / c), c = gate_softcap, u' likewise with up_softcap, s = 1 / (1 + e^-g)
    template <class A>
    Gate<A> gate(Vec<A> g, Vec<A> u) const {
        const Act<A> low_g = softcap<A>(g, static_cast<A>(gate_softcap_));
        const Act<A> low_u = softcap<A>(u, static_cast<A>(up_softcap_));
        const Act<A> s = Sigmoid::act<A>(g);
        const Vec<A> value = low_g.value * s.value;
        return {value * low_u.value, low_u.value * (low_g.derivative * s.value + low_g.value * s.derivative),
                value * low_u.derivative};
    }

private:
    double gate_softcap_, up_softcap_;
};

// h = act(g) u
template <class Type>
struct Gated {
    template <class A>
    static Gate<A> gate(Vec<A> g, Vec<A> u) {
        const Act<A> a = Type::template act<A>(g);
        return {a.value * u, u * a.derivative, a.value};
    }
};

// h = act(g)
template <class Type>
struct Ungated {
    template <class A>
    static Gate<A> gate(Vec<A> g, Vec<A>) {
        const Act<A> a = Type::template act<A>(g);
        return {a.value, a.derivative, Vec<A>{}};
    }
};

template <class Type, bool kOfGate, class F>
inline void with_gate([[maybe_unused]] const Problem& p, F f) {
    if constexpr (!kOfGate) {
        f(Type(p.activation_args));
    } else if (p.gating == Gating::kNone) {
        f(Ungated<Type>{});
    } else {
        f(Gated<Type>{});
    }
}

// Calls f with an object whose gate(g, u) is the activation of the layer.
template <class F>
inline void with_activation(const Problem& p, F f) {
    switch (p.activation) {
#define KT_ACTIVATION(name, Type, kind, ...) \
    case Activation::k##Type:                \
        return with_gate<Type, ActivationKind::kind == ActivationKind::kOfGate>(p, f);
#include "moe/activations.def"
#undef KT_ACTIVATION
    }
}

}  // namespace kt::KT_ISA
