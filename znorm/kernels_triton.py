"""Triton kernels of the z-score: measure every chunk, merge the chunks of each tensor, apply.

This is a separate module because Triton reads the source of what it compiles. Triton is optional, so only
`znorm.kernels` imports it, at the first use. Sums use combine functions of this module rather than ``tl.sum``: Triton
binds its own to the interpreter or the compiler when Triton is imported, but ours when this module is imported.
"""

# The parameters of a kernel have no types that a type checker knows, and each is a separate argument.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0913, PLR0917

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

# Kernels are not specialised on numbers: there is one build per dtype, and the self-check runs both kinds of address.


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _power(exponent):
    """2^exponent in float32 from its bits, for -126 to 127; the hardware's exp2 is only approximate."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _wide_power(exponent):
    """2^exponent in float64 from its bits, for -1022 to 1023."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent(bits):
    """Exponent e of a finite float32 m * 2^e with 1/2 <= m < 1, from its bits without sign: -148 to 128, 0 for 0."""
    # A subnormal number is its bit pattern, read as an integer, times 2^-149.
    subnormal = bits.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = tl.where(bits < 0x00800000, (subnormal >> 23) - 275, (bits >> 23) - 126)
    return tl.where(bits == 0, 0, exponent)


@triton.jit
def _places(pointers, owner, start, dtype: tl.constexpr, block: tl.constexpr):
    """Addresses of a chunk's elements."""
    return tl.load(pointers + owner).to(tl.pointer_type(dtype)) + start + tl.arange(0, block)


@triton.jit
def _is_aligned(pointers, owner):
    """Whether a tensor's address allows the widest loads; that of a view, as DDP makes them, often does not."""
    return tl.load(pointers + owner) % 16 == 0


@triton.jit
def _values(places, count, aligned, block: tl.constexpr):
    """Load a chunk as float32, padded with zeros."""
    if count == block:  # without a mask, which would forbid wide loads
        if aligned:  # noqa: SIM108 - Triton has no conditional expression for tensors
            # The compiler cannot infer this for an address from a table; without it, every element is loaded by itself.
            values = tl.load(tl.multiple_of(places, 16)).to(tl.float32)
        else:
            values = tl.load(places).to(tl.float32)
    else:
        values = tl.load(places, mask=tl.arange(0, block) < count, other=0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["chunks"])
def measure(
    pointers,
    owners,
    counts,
    first,
    finite,
    largest,
    sums,
    chunks,
    dtype: tl.constexpr,
    block: tl.constexpr,
):
    """Measure one chunk: bits of the largest magnitude; at unit scale a mean and sums of (x - mean) and (x - mean)^2.

    Everything is float32, as float64 is slow on most GPUs; nothing cancels, as the mean is subtracted before squaring.
    """
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = (chunk - tl.load(first + owner)) * block
    count = tl.minimum(tl.load(counts + owner) - start, block).to(tl.int32)
    places = _places(pointers, owner, start, dtype, block)
    values = _values(places, count, _is_aligned(pointers, owner), block)
    # Integers, as a maximum of floats may lose a NaN.
    bits = tl.reduce(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0, _larger)
    if bits >= 0x7F800000:
        tl.atomic_min(finite, 0)
    else:
        raised = -_exponent(bits)
        half = raised >> 1  # in two steps: the factor itself may not be representable in float32
        values = values * _power(half) * _power(raised - half)
        mean = tl.reduce(values, 0, _plus) / count.to(tl.float32)
        rest = tl.where(tl.arange(0, block) < count, values - mean, 0.0)
        tl.store(largest + chunk, bits)
        tl.store(sums + chunk, mean)
        tl.store(sums + chunks + chunk, tl.reduce(rest, 0, _plus))
        tl.store(sums + 2 * chunks + chunk, tl.reduce(rest * rest, 0, _plus))


@triton.jit
def _moments(chunk, inside, owners, counts, first, largest, sums, chunks, block: tl.constexpr):
    """Sizes, means and sums of squared deviations of several chunks, in float64 at the gradient's own scale."""
    owner = tl.load(owners + chunk, mask=inside, other=0)
    start = (chunk - tl.load(first + owner)) * block
    size = tl.where(inside, tl.minimum(tl.load(counts + owner) - start, block), 1).to(tl.float64)
    scale = _wide_power(_exponent(tl.load(largest + chunk, mask=inside, other=0)))
    mean = tl.load(sums + chunk, mask=inside, other=0).to(tl.float64)
    rest = tl.load(sums + chunks + chunk, mask=inside, other=0).to(tl.float64)
    squares = tl.load(sums + 2 * chunks + chunk, mask=inside, other=0).to(tl.float64)
    squares = squares - rest * rest / size
    return size, (mean + rest / size) * scale, tl.where(squares > 0, squares, 0.0) * scale * scale


@triton.jit(do_not_specialize=["mode", "width", "chunks"])
def merge(
    owners,
    counts,
    first,
    finite,
    largest,
    sums,
    scores,
    eps,
    mode,
    width,
    chunks,
    block: tl.constexpr,
    lanes: tl.constexpr,
):
    """Merge the chunks of ``width`` tensors into six numbers: x becomes (x * s1 * s2 - high - low) * f1 * f2.

    Uses Chan, Golub and LeVeque's formula for many parts at once: the total squared deviation is the sum over the parts
    of the deviation within the part plus size * (mean of the part - mean)^2. The order of every sum is fixed.
    """
    unit = tl.program_id(0)
    if tl.load(finite) != 0:
        begin = tl.load(first + unit * width)
        end = tl.load(first + (unit + 1) * width)
        lane = tl.arange(0, lanes)
        # Sums are relative to a nearby number, so the mean of equal elements, however many, is exactly their value.
        origin = tl.load(sums + begin).to(tl.float64) * _wide_power(_exponent(tl.load(largest + begin)))
        top = tl.full((lanes,), 0, tl.int32)
        count = tl.full((lanes,), 0, tl.float64)
        total = tl.full((lanes,), 0, tl.float64)
        for at in range(begin, end, lanes):
            chunk = at + lane
            inside = chunk < end
            size, mean, _ = _moments(chunk, inside, owners, counts, first, largest, sums, chunks, block)
            top = tl.maximum(top, tl.load(largest + chunk, mask=inside, other=0))
            count += tl.where(inside, size, 0.0)
            total += tl.where(inside, size * (mean - origin), 0.0)
        elements = tl.reduce(count, 0, _plus)
        centre = origin + tl.reduce(total, 0, _plus) / elements
        deviations = tl.full((lanes,), 0, tl.float64)
        for at in range(begin, end, lanes):
            chunk = at + lane
            inside = chunk < end
            size, mean, squares = _moments(chunk, inside, owners, counts, first, largest, sums, chunks, block)
            deviations += tl.where(inside, squares + size * (mean - centre) * (mean - centre), 0.0)
        exponent = _exponent(tl.reduce(top, 0, _larger))
        lowered = _wide_power(-exponent)
        variance = tl.reduce(deviations, 0, _plus) / elements * lowered * lowered
        centre = centre * lowered
        divisor = tl.sqrt(variance) + eps * tl.sqrt(centre * centre + variance)
        factor = tl.where(divisor > 0, 1.0 / tl.where(divisor > 0, divisor, 1.0), 0.0).to(tl.float32)
        high = centre.to(tl.float32)
        low = (centre - high.to(tl.float64)).to(tl.float32)
        down = -exponent >> 1
        up = exponent >> 1
        place = scores + unit * 6
        tl.store(place, _power(down))
        tl.store(place + 1, _power(-exponent - down))
        tl.store(place + 2, tl.where(mode == 2, 0.0, high))  # scale: the mean is kept
        tl.store(place + 3, tl.where(mode == 2, 0.0, low))
        tl.store(place + 4, tl.where(mode == 1, _power(up), factor))  # centre: only restores the original scale
        tl.store(place + 5, tl.where(mode == 1, _power(exponent - up), 1.0))


@triton.jit(do_not_specialize=["stride"])
def apply(
    pointers,
    owners,
    counts,
    first,
    finite,
    scores,
    stride,
    dtype: tl.constexpr,
    block: tl.constexpr,
):
    """Apply to one chunk: x becomes (x * s1 * s2 - high - low) * f1 * f2, if all elements of all tensors are finite."""
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)  # last chunk first: its elements may still be in the cache
    if tl.load(finite) != 0:
        owner = tl.load(owners + chunk)
        start = (chunk - tl.load(first + owner)) * block
        count = tl.minimum(tl.load(counts + owner) - start, block).to(tl.int32)
        places = _places(pointers, owner, start, dtype, block)
        aligned = _is_aligned(pointers, owner)
        values = _values(places, count, aligned, block)
        score = scores + owner * stride
        values = values * tl.load(score) * tl.load(score + 1)
        values = values - tl.load(score + 2) - tl.load(score + 3)
        values = values * tl.load(score + 4) * tl.load(score + 5)
        if count == block:
            if aligned:
                tl.store(tl.multiple_of(places, 16), values.to(dtype))
            else:
                tl.store(places, values.to(dtype))
        else:
            inside = tl.arange(0, block) < count
            # The padding may be outside the dtype's range.
            tl.store(places, tl.where(inside, values, 0.0).to(dtype), mask=inside)


#: False if the kernels are compiled for a GPU, True if the interpreter runs them on CPU tensors.
interpreted = not isinstance(measure, triton.runtime.JITFunction)
