"""How exact each form of Newton-Schulz is, and how far its target lies from the polar factor.

    python -m benchmarks.ns_quality

Prints a table and writes benchmarks/results/ns_quality.json. About ten seconds on two CPU cores. Matrices are 256 x 896
(the ratio of Kimi K2's experts) with three spectra: a random matrix, and singular values that fall evenly in their
logarithm over three and over five decades; and a random square matrix, which takes the standard form.

For each: `error`, the distance from the same polynomials on an exact singular value decomposition in float64; `to
polar`, the distance from the nearest semi-orthogonal matrix; both relative in the Frobenius norm; and `rms`, the root
mean square of an update that asks for 0.2. `operations` are those of the 256 x 896 matrix, in units of NS.k2().
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from k2jax.newton_schulz import NS, method_flops, newton_schulz

N, M = 256, 896
SPECTRA = {"random": (M, None), "3 decades": (M, -3), "5 decades": (M, -5), "random, square": (N, None)}
FAST = NS.fast().coeffs
SETTINGS = {
    "NS.k2()": NS.k2(),
    "NS.k2('float16')": NS.k2("float16"),
    "NS.k2('float32')": NS.k2("float32"),
    "NS.k2('float16', 'gram')": NS.k2("float16", "gram"),
    "NS.fast()": NS.fast(),
    "NS.fast('float32')": NS.fast("float32"),
    "fast's steps, standard, bfloat16": NS(FAST, "bfloat16"),
    "fast's steps, standard, float16": NS(FAST, "float16"),
}


def decompositions():
    for name, (m, decades) in SPECTRA.items():
        u, s, vt = np.linalg.svd(np.random.default_rng(0).standard_normal((N, m)), full_matrices=False)
        values = s if decades is None else np.logspace(0, decades, N)
        yield name, u, values / np.linalg.norm(values), vt


def distance(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(ns, u, s, vt):
    run = jax.jit(newton_schulz, static_argnums=1)
    got = np.asarray(run(jnp.asarray((u * s) @ vt, jnp.float32), ns), np.float64)
    for a, b, c in ns.coeffs:
        s = a * s + b * s**3 + c * s**5
    rms = 0.2 * np.sqrt(got.shape[1]) * np.sqrt(np.mean(got**2))
    return {"error": distance(got, (u * s) @ vt), "to_polar": distance(got, u @ vt), "rms": float(rms)}


def main():
    standard = method_flops(N, M, NS.k2(), "standard")
    rows = []
    for name, ns in SETTINGS.items():
        row = {"setting": name, "operations": method_flops(N, M, ns, ns.method) / standard, "spectra": {}}
        for spectrum, u, s, vt in decompositions():
            row["spectra"][spectrum] = measure(ns, u, s, vt)
        rows.append(row)
        cells = [f"{r['error']:.1e} / {r['to_polar']:.3f} / {r['rms']:.3f}" for r in row["spectra"].values()]
        print(f"| {name} | {row['operations']:.2f} | {' | '.join(cells)} |", flush=True)
    print(record.write("ns_quality", "python -m benchmarks.ns_quality", {"shape": [N, M], "settings": rows}))


if __name__ == "__main__":
    main()
