"""Each role's alphas drawn together as far as their errors explain the spread. No numpy.

A role's z_i = ln(alpha_i - 1) over the layers, with standard errors s_i, are taken as

    z_i = mu + u_i + e_i,    u_i ~ (0, tau^2),    e_i ~ (0, s_i^2)

(a random-effects meta-analysis). With weights w_i = 1 / (s_i^2 + t) and mu(t) = sum w z / sum w,

    Q(t) = sum_i w_i (z_i - mu(t))^2

falls in t and is chi-squared on n - 1 degrees of freedom at t = tau^2. tau^2 solves Q(t) = n - 1,
or is 0 where Q(0) is less: DerSimonian and Laird's moment equation, iterated until it holds (Paule
and Mandel 1982; DerSimonian and Kacker 2007). The errors here differ by tens of times, where
DerSimonian and Laird's one step weights by s_i^-2 alone and is biased. REML needs u and e normal,
and a jump of the tail's start is not. The same Q also gives tau^2 its interval (Q-profile,
Viechtbauer 2007), so that interval, estimate and test never disagree.

What the roles of a layer share, u = a + b with a ~ (0, sigma^2) common to the layer's roles and b
the role's own, is told by their products, whose mean is sigma^2, as errors of two roles have
nothing in common. With y_r = z_r - mu_r and p_r = 1 / (tau_r^2 - sigma^2 + s_r^2), a layer's best
linear guess is

    a = sigma^2 sum p y / (1 + sigma^2 sum p),    b_r = (tau_r^2 - sigma^2) p_r (y_r - a)

and z~_r = mu_r + a + b_r; without a common part this is each role's own mu + (z - mu) tau^2 /
(tau^2 + s^2). Where only what the roles agree on shall count, b_r is left out. I^2 = tau^2 /
(tau^2 + s^2) is the share of a role's spread that is signal, with Higgins and Thompson's typical
s^2 = (n - 1) sum v / ((sum v)^2 - sum v^2), v_i = s_i^-2 (2002).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError

LEVEL = 0.05  # of the test for any signal at all, and 1 - LEVEL of the intervals
HALVINGS = 200
FAR = 30  # standard deviations (and 50) beyond which chi-squared's tail is 0 in float64


@dataclass(frozen=True)
class RandomEffects:
    """One role's random effects. ``i2_low`` to ``i2_high`` is the 95 % interval of ``i2``."""

    n: int
    mean: float
    tau2: float
    q: float  # at tau^2 = 0
    i2: float
    i2_low: float
    i2_high: float


@dataclass(frozen=True)
class Estimate:
    """One matrix: its alpha (> 1) and alpha's standard error (> 0)."""

    layer: int
    role: str
    alpha: float
    se: float


@dataclass(frozen=True)
class Shrinkage:
    """Random effects of every role and what follows from them.

    Attributes:
        roles: role -> its random effects.
        common: sigma^2, the variance of what a layer's roles share.
        alphas: the shrunk alpha of each estimate, in their order.
        scores: layer -> the mean over its matrices of the shrunk alphas. Where layers have
            different roles, the roles' own levels are taken out of it.
        p: how often chance alone gives as large a spread within roles, by the sum of all Q.
        uniform: why all layers have one score; None where they differ.
    """

    roles: dict[str, RandomEffects]
    common: float
    alphas: tuple[float, ...]
    scores: dict[int, float]
    p: float
    uniform: str | None


def random_effects(values: Sequence[float], errors: Sequence[float]) -> RandomEffects:
    """The random effects of some values.

    Args:
        values: at least one.
        errors: their standard errors, all > 0.

    Raises:
        HtsrError: no values, or an error that is not positive and finite.
    """
    if not values or len(values) != len(errors):
        raise HtsrError(f"{len(values)} values with {len(errors)} errors have no common mean.")
    if not all(0 < error < math.inf for error in errors):
        raise HtsrError("Every standard error must be positive and finite.")
    degrees = len(values) - 1
    if degrees == 0:
        return RandomEffects(1, values[0], 0.0, 0.0, 0.0, 0.0, 0.0)

    def mean(t: float) -> float:
        weights = [1 / (error**2 + t) for error in errors]
        pairs = zip(weights, values, strict=True)
        return math.fsum(w * z for w, z in pairs) / math.fsum(weights)

    def q(t: float) -> float:
        middle = mean(t)
        pairs = zip(values, errors, strict=True)
        return math.fsum((z - middle) ** 2 / (s**2 + t) for z, s in pairs)

    inverse = [error**-2 for error in errors]
    total = math.fsum(inverse)
    typical = degrees * total / (total**2 - math.fsum(v * v for v in inverse))
    tau2 = _root(lambda t: q(t) - degrees)
    low = _root(lambda t: chi2_cdf(q(t), degrees) - (1 - LEVEL / 2))
    high = _root(lambda t: chi2_cdf(q(t), degrees) - LEVEL / 2)
    i2, i2_low, i2_high = (t / (t + typical) for t in (tau2, low, high))
    return RandomEffects(len(values), mean(tau2), tau2, q(0.0), i2, i2_low, i2_high)


def shrink(estimates: Sequence[Estimate], own: bool = True) -> Shrinkage:
    """Shrink every role's z over the layers, or all the way if nothing tells the layers apart.

    Args:
        estimates: of all layers and roles.
        own: whether what is a role's own, b_r, counts besides what the layer's roles share, a.

    One test for the whole model stands before: where the sum of the roles' Q is no larger than
    chance gives in 1 of 20 models without signal, every tau^2 is taken as 0.

    Raises:
        HtsrError: no estimates, an alpha at or below 1, an error that is not positive.
    """
    if not estimates:
        raise HtsrError("There are no alphas to shrink.")
    if not all(1 < e.alpha < math.inf for e in estimates):
        raise HtsrError("Every alpha must be above 1 and finite.")
    z = [math.log(e.alpha - 1) for e in estimates]
    s = [e.se / (e.alpha - 1) for e in estimates]
    roles: dict[str, RandomEffects] = {}
    for role in dict.fromkeys(e.role for e in estimates):
        places = [i for i, e in enumerate(estimates) if e.role == role]
        roles[role] = random_effects([z[i] for i in places], [s[i] for i in places])
    q = math.fsum(found.q for found in roles.values())
    degrees = sum(found.n - 1 for found in roles.values())
    p = 1 - chi2_cdf(q, degrees) if degrees else 1.0
    uniform = None
    means = [roles[e.role].mean for e in estimates]
    y = [value - mean for value, mean in zip(z, means, strict=True)]
    tau2 = [roles[e.role].tau2 for e in estimates]
    layers: dict[int, list[int]] = {}
    for i, e in enumerate(estimates):
        layers.setdefault(e.layer, []).append(i)
    common = _common(y, [1 / (t + error**2) for t, error in zip(tau2, s, strict=True)], layers)
    shrunk = list(means)
    if p <= LEVEL:
        for places in layers.values():
            effects = _effects(places, y, s, tau2, common, own)
            for i, effect in zip(places, effects, strict=True):
                shrunk[i] += effect
        if not own and common == 0:
            uniform = (
                "uniform: the roles of a layer have nothing in common that tells it from others"
            )
    else:
        uniform = (
            f"uniform: the spread of ln(alpha - 1) within roles is what its errors give "
            f"(Q = {q:.1f} on {degrees} degrees of freedom, p = {p:.2g})"
        )
    alphas = [1 + math.exp(value) for value in shrunk]
    level = math.fsum(1 + math.exp(found.mean) for found in roles.values()) / len(roles)
    away = [alpha - (1 + math.exp(mean)) for alpha, mean in zip(alphas, means, strict=True)]
    scores = {
        layer: level + math.fsum(away[i] for i in places) / len(places)
        for layer, places in layers.items()
    }
    return Shrinkage(roles, common, tuple(alphas), scores, p, uniform)


def _common(y: list[float], weights: list[float], layers: dict[int, list[int]]) -> float:
    """sigma^2: the weighted mean of y_i y_j over the pairs of a layer's matrices, at least 0."""
    products, total = 0.0, 0.0
    for own in layers.values():
        square = math.fsum((weights[i] * y[i]) ** 2 for i in own)
        products += math.fsum(weights[i] * y[i] for i in own) ** 2 - square
        square = math.fsum(weights[i] ** 2 for i in own)
        total += math.fsum(weights[i] for i in own) ** 2 - square
    return max(0.0, products / total) if total > 0 else 0.0


def _effects(
    places: list[int], y: list[float], s: list[float], tau2: list[float], common: float, own: bool
) -> list[float]:
    """a + b_r, or a alone, of the matrices of a layer at their ``places``."""
    common = min(common, *(tau2[i] for i in places))
    p = [1 / (tau2[i] - common + s[i] ** 2) for i in places]
    a = common * math.fsum(w * y[i] for w, i in zip(p, places, strict=True))
    a /= 1 + common * math.fsum(p)
    part = float(own)
    return [a + part * (tau2[i] - common) * w * (y[i] - a) for w, i in zip(p, places, strict=True)]


def chi2_cdf(x: float, degrees: int) -> float:
    """P(chi-squared <= x), by the incomplete gamma function's series (DLMF 8.11.4)."""
    if x <= 0:
        return 0.0
    if x > degrees + 50 + FAR * math.sqrt(2 * degrees):
        return 1.0
    a, half = degrees / 2, x / 2
    term, total, n = 1.0, 1.0, 0
    while term > total * 1e-17:
        n += 1
        term *= half / (a + n)
        total += term
    return min(1.0, total * math.exp(a * math.log(half) - half - math.lgamma(a + 1)))


def _root(f: Callable[[float], float]) -> float:
    """Where a falling function of t >= 0 is zero; 0 where it is never positive."""
    if f(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while f(high) > 0:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return high
