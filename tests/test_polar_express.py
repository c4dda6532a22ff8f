"""The generator of coefficients against published tables, and what every published set does to singular values."""

import numpy as np
import pytest

from k2jax.muonclip import NS, polar_express

MODDED_NANOGPT = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
PAPER = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
KELLER = NS.k2().coeffs
DEEPSEEK_V4 = KELLER[:1] * 8 + ((2.0, -1.5, 0.5),) * 2


def safer(coeffs, s):
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in coeffs)


def test_generator_gives_the_numbers_of_modded_nanogpt():
    got = polar_express(1e-3, steps=5, eps=0.02, cushion=0.02)
    np.testing.assert_allclose(got, MODDED_NANOGPT, rtol=0, atol=1e-12)


def test_generator_gives_the_numbers_of_the_papers_code():
    got = polar_express(1e-3, steps=8, eps=0, cushion=0.02407327424182761)
    np.testing.assert_allclose(got, PAPER, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "coeffs", "slope", "peak", "error", "error_from_1e_2", "rms"),
    [
        ("keller 5", KELLER, 485, 1.202, 0.529, 0.318, 0.211),
        ("you 5", YOU, 493, 1.145, 0.525, 0.032, 0.123),
        ("modded 5", MODDED_NANOGPT, 990, 1.141, 0.141, 0.141, 0.094),
        ("paper's first 6, all safer", safer(PAPER[:6], 1.01), 1828, 1.001, 0.006, 0.003, 0.001),
        ("paper's 8, safer", safer(PAPER[:7], 1.01) + PAPER[7:], 6363, 1.000, 2e-4, 0, 0),
        ("DeepSeek-V4", DEEPSEEK_V4, 79263, 1.002, 0.001, 0.001, 0),
        ("NS.fast", NS.fast().coeffs, 1896, 1.002, 0.002, 0.002, 0.001),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quality_of_every_set(name, coeffs, slope, peak, error, error_from_1e_2, rms):
    """Errors of singular values in [1e-3, 1], evenly spaced in their logarithm, and the peak of all in (0, 1]."""
    start = np.logspace(-7, 0, 70_001)
    s = start.copy()
    for a, b, c in coeffs:
        s = a * s + b * s**3 + c * s**5
    off = np.abs(s - 1)[start >= 1e-3]
    assert np.prod([a for a, _, _ in coeffs]) == pytest.approx(slope, rel=1e-3)
    got = (s.max(), off.max(), off[start[start >= 1e-3] >= 1e-2].max(), np.sqrt(np.mean(off**2)))
    np.testing.assert_allclose(got, (peak, error, error_from_1e_2, rms), rtol=0, atol=1e-3)


def test_a_longer_interval_costs_quality_and_reaches_smaller_values():
    near, far = (polar_express(l, steps=6) for l in (1e-2, 1e-5))
    assert np.prod([a for a, _, _ in far]) > np.prod([a for a, _, _ in near])


@pytest.mark.parametrize("wrong", [{"l": 0}, {"l": 1}, {"steps": 0}, {"eps": -0.1}, {"cushion": 0}, {"cushion": 1.5}])
def test_wrong_arguments_are_an_error_with_their_values(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        polar_express(**wrong)
