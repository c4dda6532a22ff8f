"""QK-Clip driven by every path of attention: full and MoBA, by the definition, XLA, and the kernels of both devices."""

import pytest

from k2jax.kernels.attention import tpu as full_tpu
from k2jax.kernels.moba import tpu as moba_tpu
from tests.clip_paths import BLOCKS, SCALE, assert_clipped, attend_by
from tests.on_devices import told_by


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("kind", ["full", "moba"])
def test_a_clip_brings_the_logits_that_attention_reports_to_the_threshold(kind, implementation, dtype):
    assert_clipped(attend_by(kind, implementation), dtype)


@pytest.mark.parametrize("kind", ["full", "moba"])
def test_a_clip_is_driven_by_the_kernels_for_tpus(kind):
    def attend(q, k, v):
        if kind == "full":
            return full_tpu.attention(q, k, v, scale=SCALE, interpret=True).max_logit_BH
        return moba_tpu.moba_attention(q, k, v, scale=SCALE, **BLOCKS, interpret=True).residuals.max_logit_BH

    assert_clipped(attend, "bfloat16")


BY_HOPPER_KERNELS = """
import functools, json, sys
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.attention import sm90 as full
from k2jax.kernels.moba import sm90
from tests import gpu_interpreter
from tests.clip_paths import BLOCKS, SCALE, assert_clipped

gpu_interpreter.patch()
options = {"scale": SCALE, "num_sms": 3, "interpret": plgpu.InterpretGPUParams()}
if sys.argv[1] == "full":
    attend = lambda *qkv: full.attention(*qkv, **options).max_logit_BH
else:
    attend = lambda *qkv: sm90.moba_attention(*qkv, **BLOCKS, **options).residuals.max_logit_BH
assert_clipped(attend, "bfloat16")
print(json.dumps("clipped"))
"""


@pytest.mark.check
@pytest.mark.parametrize("kind", ["full", "moba"])
def test_a_clip_is_driven_by_the_kernels_for_hopper(kind, monkeypatch):
    # Every simulated warpgroup that waits at a barrier holds a thread of XLA's pool, which has one per core.
    monkeypatch.setenv("NPROC", "24")
    assert told_by(BY_HOPPER_KERNELS, 1, arguments=[kind]) == "clipped"
