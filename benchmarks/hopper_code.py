r"""What NVIDIA's compiler makes of the Hopper kernels: registers, spills, and whether their products overlap.

No GPU is needed, only the compilers, in a folder of their own so that no other program starts to look for a GPU:

    V=$(python -c "import jax; print(jax.__version__)")
    python -m pip install --no-deps --target build/cuda \
      jax-cuda13-pjrt==$V jax-cuda13-plugin==$V nvidia-cuda-nvcc nvidia-cuda-nvdisasm nvidia-nvvm
    JAX_PLATFORMS=cpu python -m benchmarks.hopper_code --cuda build/cuda [--write]

A kernel whose accumulators do not fit in its registers still runs: the compiler then waits for every single product
("serialized"), which no test of values sees. This is the place that does. It asks jax for more than its public
interface gives: how a plugin is loaded, and the environment variables of Mosaic GPU. A kernel that an earlier case
compiled already is not told again. The compilers exist for Linux.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.topologies import TopologyDescription
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client

from benchmarks import record
from k2jax.kernels.attention import sm90 as attention
from k2jax.kernels.moba import sm90 as moba

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  cuda_compute_capability { major: 9  minor: 0 }
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9  minor: 8 }
"""
# What differs from `compile_case`'s call.
CASES = {
    "full": {},
    "full, heads of 64": {"K": 64, "V": 64},
    "full, grouped heads": {"G": 4},
    "full, documents": {"documents": True},
    "full, MLA": {"K": 192},
    "MoBA": {"T": 16384, "sparse": True},
    "MoBA, 64 blocks": {"T": 16384, "sparse": True, "top_k": 64},
    "MoBA, short": {"T": 6144, "sparse": True},
    "MoBA, shorter": {"sparse": True},
    "MoBA, documents": {"T": 16384, "sparse": True, "documents": True},
    "MoBA, a chunk": {"T": 16384, "sparse": True, "chunk": True},
    "MoBA, MLA": {"T": 16384, "sparse": True, "K": 192},
}


def main(argv=None):
    options = argparse.ArgumentParser(prog="python -m benchmarks.hopper_code")
    options.add_argument("--cuda", type=Path, required=True, help="the folder with the compilers")
    options.add_argument("--write", action="store_true", help="write benchmarks/results/hopper_code.json")
    args = options.parse_args(argv)
    device = compile_only_device(args.cuda)
    kernels = []
    with tempfile.TemporaryDirectory() as dump:
        os.environ["MOSAIC_GPU_DUMP_TO"] = dump
        for number, (name, case) in enumerate(CASES.items()):
            start = time.perf_counter()
            for kernel in compile_case(device, Path(dump), **case):
                kernels.append({"case": name, **kernel})
                print(f"{name:22} {line(kernel)}", flush=True)
            print(f"  {number + 1} of {len(CASES)} cases, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if args.write:
        # What earlier forms of the kernels took was written by hand and is kept.
        tried = (record.read("hopper_code") or {}).get("tried", [])
        data = {"compiler": _ptxas_version(args.cuda), "kernels": kernels, "tried": tried}
        print(record.write("hopper_code", "python -m benchmarks.hopper_code --cuda build/cuda --write", data))


def compile_only_device(cuda: Path):
    """An H100 that programs can be compiled for and that runs none.

    Raises FileNotFoundError where the folder lacks a compiler.
    """
    cuda = cuda.resolve()
    plugin = cuda / "jax_plugins/xla_cuda13/xla_cuda_plugin.so"
    runtime = cuda / "jax_cuda13_plugin/libmosaic_gpu_runtime.so"
    root = cuda / "nvidia/cu13"
    for needed in (plugin, runtime, root / "bin/ptxas", root / "bin/nvdisasm", root / "nvvm/libdevice"):
        if not needed.exists():
            raise FileNotFoundError(f"--cuda={cuda}: {needed} is missing; install it as this file's docstring says")
    os.environ["PATH"] = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(runtime)
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(root)
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    api = xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin))
    xla_client.initialize_pjrt_plugin("cuda")
    topology = xla_client.make_c_api_device_topology(api, "1x1x1", topology="1x1x1", target_config=H100)
    (device,) = TopologyDescription(topology._make_compile_only_devices()).devices
    return device


def compile_case(
    device, dump: Path, *, T=4096, G=16, K=128, V=128, sparse=False, top_k=8, documents=False, chunk=False
) -> list[dict]:
    """What the compiler said of each kernel in one op's forward and backward, as `read`; empties the folder `dump`.

    Batch 2, T tokens, 16 query heads, G key heads of size K, values of size V. chunk: the second half of the queries.
    """
    settings = {"scale": K**-0.5, "num_sms": 132, "interpret": False}
    if documents:
        settings["segment_ids"] = jnp.broadcast_to(jnp.arange(T) // (T // 4), (2, T))
    if chunk:
        settings["q_offset"] = T // 2
    if sparse:
        settings |= {"block_size": 128, "top_k": top_k}
    op = moba.moba_attention if sparse else attention.attention

    def forward_and_backward(q, k, v, dout):
        return jax.vjp(lambda *x: op(*x, **settings)[0], q, k, v)[1](dout)

    everywhere = NamedSharding(Mesh([device], ("device",)), PartitionSpec())
    rows = T // 2 if chunk else T
    shapes = [(2, rows, 16, K), (2, T, G, K), (2, T, G, V), (2, rows, 16, V)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere) for shape in shapes]
    # Tuning measures, so it needs a GPU.
    options = {"xla_gpu_cuda_data_dir": os.environ["MOSAIC_GPU_CUDA_ROOT"], "xla_gpu_autotune_level": 0}
    jax.jit(forward_and_backward).lower(*inputs).compile(compiler_options=options)
    told = [(re.sub(r"_\d+$", "", path.stem), path.read_text()) for path in sorted(dump.glob("*.ptxas"))]
    if not told:
        raise RuntimeError(f"the compiler left nothing in MOSAIC_GPU_DUMP_TO={dump}")
    for path in dump.iterdir():
        path.unlink()
    return [{"kernel": kernel, **read(text)} for kernel, text in told]


def read(told: str) -> dict:
    """What ptxas told of one kernel.

    Returns: registers at the start, of a thread; bytes of spill stores and loads in its code; whether it waits for
    every product.

    Raises ValueError where the text does not say it.
    """
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    registers = re.search(r"Used (\d+) registers", told)
    if not spilled or not registers:
        raise ValueError(f"this is not what ptxas tells of a kernel: {told[:200]!r}")
    return {
        "registers": int(registers[1]),
        "spill_stores": int(spilled[1]),
        "spill_loads": int(spilled[2]),
        "serialized": "wgmma.mma_async instructions are serialized" in told,
    }


def line(kernel: dict) -> str:
    """One row of the table."""
    spills = f"spills {kernel['spill_stores']:4} / {kernel['spill_loads']:4} bytes"
    return f"{kernel['kernel']:18} {spills}  {'SERIALIZED' if kernel['serialized'] else 'overlapped'}"


def _ptxas_version(cuda: Path) -> str:
    (folder,) = cuda.glob("nvidia_cuda_nvcc-*.dist-info")
    return folder.name.removesuffix(".dist-info")


if __name__ == "__main__":
    main()
