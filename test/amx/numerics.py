"""The tile products by the manual's formulas, in numpy."""

import numpy

QUIET = numpy.uint32(0x00400000)
DEFAULT_NAN = numpy.uint32(0xFFC00000)
SMALLEST_NORMAL = 2.0**-126


def bits(x: numpy.ndarray) -> numpy.ndarray:
    """Returns the bits of float32 values."""
    return numpy.ascontiguousarray(x, dtype=numpy.float32).view(numpy.uint32)


def flush(x: numpy.ndarray) -> numpy.ndarray:
    """Replaces float32 denormals by zeros of the same sign."""
    return numpy.where(numpy.abs(x) < SMALLEST_NORMAL, numpy.copysign(numpy.float32(0), x), x)


def widen(x: numpy.ndarray) -> numpy.ndarray:
    """Returns the float32 values of bfloat16 bits, with denormals as zero."""
    return flush((x.astype(numpy.uint32) << 16).view(numpy.float32))


def fused(total: numpy.ndarray, a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Returns total + a * b rounded once to float32, to nearest even; denormal operands and results are zero.

    The product of two bfloat16 values, and of a value and one, is exact in float64. The sum is rounded to odd
    there (S. Boldo, G. Melquiond, Emulation of FMA and correctly rounded sums, IEEE TC 57 (4), 2008), so that
    rounding it to float32 equals one rounding of the exact sum. A NaN result is the first NaN of a, b, total,
    made quiet.
    """
    total, a, b = (flush(x) for x in (total, a, b))
    with numpy.errstate(all="ignore"):
        x, y = total.astype(numpy.float64), a.astype(numpy.float64) * b.astype(numpy.float64)
        result = x + y
        back = result - x
        lost = (x - (result - back)) + (y - back)  # the error of the sum, exactly (Knuth)
        toward = numpy.where(lost > 0, numpy.inf, -numpy.inf)
        even = (result.view(numpy.int64) & 1) == 0
        odd = numpy.where(
            even & (lost != 0) & numpy.isfinite(result), numpy.nextafter(result, toward), result
        )
        rounded = odd.astype(numpy.float32)
        tiny = numpy.abs((odd * 2.0**60).astype(numpy.float32)) < SMALLEST_NORMAL * 2.0**60
    rounded = numpy.where(tiny, numpy.copysign(numpy.float32(0), odd), rounded).astype(numpy.float32)
    operands = numpy.broadcast_arrays(a, b, total)
    payload = numpy.select([numpy.isnan(v) for v in operands], [bits(v) for v in operands], DEFAULT_NAN)
    return (
        numpy.where(numpy.isnan(rounded), payload | QUIET, bits(rounded))
        .astype(numpy.uint32)
        .view(numpy.float32)
    )


def plus(x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    """Returns x + y rounded as in :func:`fused`; the first of two NaNs."""
    return fused(y, x, numpy.float32(1))


def tdpbf16ps(c: numpy.ndarray, a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Returns c [m, n] float32 + a [m, 2k] . b [k, 2n], bits of bfloat16.

    Follows the manual's order: separate sums of even and odd elements, each from zero over ascending k, then
    even + odd, then c + that.
    """
    a, b = widen(a), widen(b)
    even = numpy.zeros_like(c)
    odd = numpy.zeros_like(c)
    for k in range(b.shape[0]):
        even = fused(even, a[:, 2 * k, None], b[None, k, 0::2])
        odd = fused(odd, a[:, 2 * k + 1, None], b[None, k, 1::2])
    return plus(c, plus(even, odd))


def int8_product(name: str, c: numpy.ndarray, a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Returns c [m, n] uint32 + a [m, 4k] . b [k, 4n] modulo 2^32; letters 5 and 6 of the name are u or s."""
    kinds = {"s": numpy.int8, "u": numpy.uint8}
    left = a.view(kinds[name[4]]).astype(numpy.int64)
    right = b.view(kinds[name[5]]).astype(numpy.int64).reshape(b.shape[0], -1, 4)
    product = numpy.einsum("mkj,knj->mn", left.reshape(a.shape[0], -1, 4), right)
    return ((c.astype(numpy.int64) + product) % 2**32).astype(numpy.uint32)
