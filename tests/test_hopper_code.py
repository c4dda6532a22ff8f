"""benchmarks/hopper_code.py reads what the GPU's compiler tells, and says what it needs."""

import pytest

from benchmarks import hopper_code

FITS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gate_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for gate_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
SPILLS = FITS.replace("0 bytes spill stores, 0 bytes", "448 bytes spill stores, 468 bytes")
SERIALIZED = (
    "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the function 'gate_mosaic_gpu_kernel'\n"
)


def test_what_the_compiler_tells_is_read():
    fits = {"registers": 168, "spill_stores": 0, "spill_loads": 0, "serialized": False}
    assert hopper_code.read(FITS) == fits
    assert hopper_code.read(SERIALIZED + SPILLS) == fits | {"spill_stores": 448, "spill_loads": 468, "serialized": True}
    with pytest.raises(ValueError, match="not what ptxas tells"):
        hopper_code.read("ptxas fatal   : Ptx assembly aborted due to errors")


def test_a_missing_compiler_is_named_before_anything_is_compiled(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"xla_cuda_plugin\.so is missing; install it"):
        hopper_code.main(["--cuda", str(tmp_path)])


def test_the_table_shows_what_matters():
    kernel = {"kernel": "gate", **hopper_code.read(SERIALIZED + SPILLS)}
    assert hopper_code.line(kernel) == "gate               spills  448 /  468 bytes  SERIALIZED"
