"""Samplers that remember: earlier predictions raise the order at no further evaluations.

The protocol is that of `samplers.py`. `order_at` says how much memory a step may use: none in the
first step of a run, wherever it begins, and what the grid allows near its end.
"""

import jax
import jax.numpy as jnp

from jaxsd.diffusion.steps import History, Noise, Predict, Step, Steps


def order_at(steps: Steps, i) -> jax.Array:
    """The order of step i: what the grid allows, and no more than the steps taken since `first`."""
    return jnp.minimum(steps.at(i).order, i - steps.first + 1)


def _before(steps: Steps, i, back: int):
    return steps.at(jnp.maximum(i - back, 0))


# --- Adams-Bashforth --------------------------------------------------------------------------

# Weights of the newest prediction and those before it, for each row of a run.
PLMS = (
    (1, 0, 0, 0),
    (1 / 2, 1 / 2, 0, 0),  # the second row repeats the first step with the mean of both ends
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def pndm(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Pseudo numerical methods (Liu et al. 2022, 2202.09778): fourth-order Adams-Bashforth.

    What is combined are the predictions, of whatever kind, and then DDIM's step is made with them.
    A row of the grid is one evaluation (`pndm_grid`): two for the first step, or with a Runge-Kutta
    start four for each of the first three.
    """
    s, (*past, begin, total) = steps.at(i), history
    said = predict.denoise(x, s.t)
    row = i - steps.first
    weights = jnp.asarray(PLMS, x.dtype)[jnp.minimum(row, 4)]
    combined = sum(w * each for w, each in zip(weights, (said, *past), strict=True))
    alpha, sigma = s.alpha, s.sigma
    next_alpha, next_sigma = s.next_alpha, s.next_sigma
    if predict.schedule.skip_prk_steps:
        again, remember = row == 1, row != 1
        alpha, sigma, next_alpha, next_sigma = (
            jnp.where(again, repeated, usual)
            for repeated, usual in (
                (s.mid_alpha, s.alpha),
                (s.mid_sigma, s.sigma),
                (s.alpha, s.next_alpha),
                (s.sigma, s.next_sigma),
            )
        )
        begin = jnp.where(again, begin, x)
    else:
        stage, warm = i % 4, i < 12
        remember = ~warm | (stage == 0)
        begin = jnp.where(warm & (stage > 0), begin, x)
        total = jnp.where(stage == 0, 0.0, total)
        total = total + jnp.asarray(RUNGE_KUTTA, x.dtype)[stage] * said
        combined = jnp.where(warm, jnp.where(stage == 3, total, said), combined)
    x0, eps = predict.split(combined, begin, alpha, sigma)
    x = next_alpha * x0 + next_sigma * eps
    newest = (said, *past[:-1])
    past = [jnp.where(remember, new, old) for new, old in zip(newest, past, strict=True)]
    return x, (*past, begin, total)


def lms(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """Linear multistep of order 4 for dy/dr (k-diffusion): Lagrange's polynomial, integrated.

    y' = x0 + r' d + sum_j c_j (d_j - d), as all c_j together are r' - r.
    """
    s, order = steps.at(i), order_at(steps, i)
    x0, d = predict.slope(x, s.t, s.alpha, s.sigma)
    rows = [s, *(_before(steps, i, back) for back in (1, 2, 3))]
    nodes = [row.sigma / jnp.maximum(row.alpha, 1e-20) for row in rows]
    end = s.next_sigma / s.next_alpha
    # Two points of Gauss and Legendre integrate cubics exactly.
    middle, half = (nodes[0] + end) / 2, (end - nodes[0]) / 2
    points = (middle - half / 3**0.5, middle + half / 3**0.5)

    def coefficient(j: int) -> jax.Array:
        def basis(r):
            product = jnp.ones_like(r)
            for k in range(4):
                if k != j:
                    gap = jnp.where(nodes[j] == nodes[k], 1.0, nodes[j] - nodes[k])
                    product = product * jnp.where(k < order, (r - nodes[k]) / gap, 1.0)
            return product

        return jnp.where(j < order, half * (basis(points[0]) + basis(points[1])), 0.0)

    change = sum(coefficient(j) * (history[j - 1] - d) for j in (1, 2, 3))
    x = s.next_alpha * (x0 + change) + s.next_sigma * d
    return x, (d, *history[:-1])


# --- Exponential integrators ------------------------------------------------------------------


def _exponential_weights(h: jax.Array, sde: bool, heun: bool):
    """Of D0, of D1 in a second-order step, of D1 and D2 in a third-order one; h: the step.

    The SDE's D2 has the sign that diffusers gives it: -1/2 where k-diffusion has +1/2.
    """
    g = 2 * h if sde else h
    safe = jnp.where(g == 0, 1.0, g)
    first = -jnp.expm1(-g)
    linear = 1 - first / safe
    square = (-0.5 if sde else 0.5) - (safe - first) / (safe * safe)
    linear, square = (jnp.where(g == 0, 0.0, weight) for weight in (linear, square))
    return first, (linear if heun else first / 2), linear, square


def _exponential_step(begin, start_sigma, s: Step, h, d, noise: Noise | None) -> jax.Array:
    """From the latents `begin` to the end of row s, h away; d: the weighted x0."""
    decay = s.next_sigma / start_sigma
    if noise is None:
        return decay * begin + s.next_alpha * d
    renewed = jnp.sqrt(jnp.maximum(-jnp.expm1(-2 * h), 0.0))
    return decay * jnp.exp(-h) * begin + s.next_alpha * d + s.next_sigma * renewed * noise(0)


def dpmpp(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DPM-Solver++ multistep (Lu et al. 2022, 2211.01095, algorithm 2), for the ODE.

    Its order is one more than the predictions it remembers.
    """
    return _dpmpp(predict, x, history, steps, i, None)


def dpmpp_sde(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DPM-Solver++ multistep for the SDE: as `dpmpp`, with fresh noise in each step."""
    return _dpmpp(predict, x, history, steps, i, noise)


def _dpmpp(predict: Predict, x, history: History, steps: Steps, i, noise: Noise | None):
    s, order = steps.at(i), order_at(steps, i)
    x0, _ = predict(x, s.t, s.alpha, s.sigma)
    h, heun = s.gap, predict.schedule.solver_type == "heun"
    first, second, linear, square = _exponential_weights(h, noise is not None, heun)

    def ratio(back: int) -> jax.Array:  # of an earlier step to this one, or 1
        return jnp.where((order > back) & (h != 0), _before(steps, i, back).gap / h, 1.0)

    r = ratio(1)
    d1 = (x0 - history[0]) / r
    d = first * x0 + jnp.where(order == 2, second, 0.0) * d1
    if len(history) == 2:
        r_before = ratio(2)
        d2 = (d1 - (history[0] - history[1]) / r_before) / (r + r_before)
        third = linear * (d1 + r * d2) + square * d2
        d = d + jnp.where(order == 3, 1.0, 0.0) * third
    return _exponential_step(x, s.sigma, s, h, d, noise), (x0, *history[:-1])


def dpmpp_singlestep(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """DPM-Solver++ in groups of steps (2211.01095, algorithm 1): each group starts anew.

    The k-th step of a group goes from the group's beginning, with k predictions.
    """
    schedule, s, order = predict.schedule, steps.at(i), order_at(steps, i)
    sde, heun = schedule.algorithm_type == "sde-dpmsolver++", schedule.solver_type == "heun"
    begin, m1, m2 = history
    x0, _ = predict(x, s.t, s.alpha, s.sigma)
    begin = jnp.where(order == 1, x, begin)
    one, two = _before(steps, i, 1), _before(steps, i, 2)
    sigma = jnp.stack([s.sigma, one.sigma, two.sigma])[order - 1]
    so_far = jnp.where(order == 2, one.gap, one.gap + two.gap)  # from the group's beginning
    h = s.gap + jnp.where(order == 1, 0.0, so_far)
    first, second, linear, square = _exponential_weights(h, sde, heun)
    # how far into the step the newest and the middle prediction were made, or 1
    now = jnp.where(order > 1, so_far / h, 1.0)
    between = jnp.where(order > 2, two.gap / h, 1.0)
    oldest = jnp.where(order == 1, x0, jnp.where(order == 2, m1, m2))
    d1 = (x0 - oldest) / now
    d = first * oldest + jnp.where(order == 2, second, 0.0) * d1
    third = linear * d1
    if heun:
        d1_between = (m1 - m2) / between
        apart = jnp.where(order == 3, now - between, 1.0)
        third = linear * (now * d1_between - between * d1) / apart
        third = third + square * 2 * (d1 - d1_between) / apart
    d = d + jnp.where(order == 3, 1.0, 0.0) * third
    x = _exponential_step(begin, sigma, s, h, d, noise if sde else None)
    return x, (begin, x0, m1)


def _moments(h: jax.Array, bh1: bool) -> tuple[jax.Array, list[jax.Array]]:
    """B(h) and the right-hand sides b_1, b_2, b_3 of UniPC's equations for its weights."""
    hh = -jnp.where(h == 0, 1.0, h)
    phi = jnp.expm1(hh)
    b_h = hh if bh1 else phi
    moments = []
    for factorial in (1, 2, 6):
        phi = phi / hh - 1 / factorial
        moments.append(phi * factorial / b_h)
    return jnp.where(h == 0, 0.0, b_h), moments


def _weights(nodes: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    """rho with sum_j rho_j nodes_j^(k-1) = b_k, by Lagrange's polynomials; two or three nodes."""
    rho = []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        scale = 1.0
        for other in others:
            scale = scale * (node - other)
        if len(others) == 1:
            value = b[1] - others[0] * b[0]
        else:
            value = b[2] - (others[0] + others[1]) * b[1] + others[0] * others[1] * b[0]
        rho.append(value / jnp.where(scale == 0, 1.0, scale))
    return rho


def unipc(predict: Predict, x, history: History, steps: Steps, i, noise: Noise, eta):
    """UniPC (Zhao et al. 2023, 2302.04867) for x0, B(h) = h or e^h - 1 (bh1, bh2).

    The prediction made for this step first corrects the last step's end, then predicts the next.
    """
    bh1 = predict.schedule.solver_type == "bh1"
    last_x, *past = history
    s, last = steps.at(i), _before(steps, i, 1)
    x0, _ = predict(x, s.t, s.alpha, s.sigma)

    def slopes(row, h, order, values):
        """Where earlier values were found, in units of the step, and their divided differences."""
        one, two = _before(steps, row, 1).gap, _before(steps, row, 2).gap
        nodes = [
            -jnp.where((order > back) & (h != 0), gap / h, float(back))
            for back, gap in ((1, one), (2, one + two))
        ]
        return nodes, [(v - values[0]) / r for v, r in zip(values[1:], nodes, strict=True)]

    def by_order(order, second, third):
        return jnp.where(order == 2, second, jnp.where(order == 3, third, 0.0))

    def advance(begin, start, alpha, sigma, value, change):
        step = jnp.expm1(-start.gap) * value + change
        return sigma / start.sigma * begin - alpha * step

    order = jnp.maximum(order_at(steps, i - 1), 1)
    b_h, b = _moments(last.gap, bh1)
    nodes, d = slopes(i - 1, last.gap, order, past)
    one = jnp.ones_like(last.gap)
    two, three = _weights([nodes[0], one], b), _weights([*nodes, one], b)
    change = by_order(order, two[0], three[0]) * d[0] + by_order(order, 0.0, three[1]) * d[1]
    newest = jnp.where(order == 1, 0.5, by_order(order, two[1], three[2]))
    change = b_h * (change + newest * (x0 - past[0]))
    corrected = advance(last_x, last, s.alpha, s.sigma, past[0], change)
    x = jnp.where(i > steps.first, corrected, x)

    order = order_at(steps, i)
    b_h, b = _moments(s.gap, bh1)
    nodes, d = slopes(i, s.gap, order, [x0, *past[:2]])
    three = _weights(nodes, b)
    change = by_order(order, 0.5, three[0]) * d[0] + by_order(order, 0.0, three[1]) * d[1]
    ahead = advance(x, s, s.next_alpha, s.next_sigma, x0, b_h * change)
    return ahead, (x, x0, *past[:2])
