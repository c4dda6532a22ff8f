"""Work space of Muon's update of one leaf of Kimi K2's experts on 64 TPU v5p chips: this project's and optax's.

    TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu python -m benchmarks.muon_memory

Compiles ahead of time with libtpu; no chip is needed and none ran it. The leaf is float32 [4, 384, 7168, 2048] (layers,
experts, model, hidden), its experts cut 8 ways and its model dimension 8 ways, with gradient and momentum; gradient and
state are donated. "temporary" is what the compiler reserves on one chip beyond them, or what it says that it would need
where that is more than a chip has. Prints the rows and writes benchmarks/results/muon_memory.json. Two minutes on two
CPU cores.
"""

import argparse
import re
import time

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import record
from k2jax.muonclip import NS, MatrixSpec, muonclip

LEAF = (4, 384, 7168, 2048)
TOPOLOGY = "v5p:4x4x4"
COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "collective-permute")
OPTIMIZERS = {
    "k2jax muonclip, NS.k2": lambda: muonclip(2e-4, matrix_specs={"w": MatrixSpec()}, ns=NS.k2()),
    "k2jax muonclip, NS.fast": lambda: muonclip(2e-4, matrix_specs={"w": MatrixSpec()}, ns=NS.fast()),
    # Three axes are no matrix to optax unless it is told which.
    "optax.contrib.muon": lambda: optax.contrib.muon(
        2e-4,
        weight_decay=0.1,
        muon_weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=3)},
    ),
}


def measure(make, shape, kind):
    """Row of one optimizer, compiled for 64 chips under a mesh whose axes are of this kind."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    devices = np.array(topology.devices).reshape(8, 8)
    mesh = Mesh(devices, ("experts", "model"), axis_types=(kind,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(None, "experts", "model", None))
    leaf = {"w": jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)}
    tx = make()

    def placed(x):
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if x.shape == shape else whole)

    with jax.set_mesh(mesh):
        state = jax.tree.map(placed, jax.eval_shape(tx.init, leaf))
        start = time.perf_counter()
        out = jax.tree.map(lambda x: x.sharding, (leaf, state))
        update = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=(0, 1), out_shardings=out)
        try:
            compiled = update.lower(leaf, state, leaf).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
            if needed is None:
                raise
            return {"temporary_gib": float(needed[1]), "refused": f"a chip has {needed[2]} GiB"}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "aliased_gib": round(memory.alias_size_in_bytes / 2**30, 2),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        **{name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES},
        "compile_seconds": round(time.perf_counter() - start),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LEAF[0], help="fewer for a quick look; then nothing is written")
    parser.add_argument("--only", default="", help="optimizers whose name holds this; then nothing is written")
    args = parser.parse_args()
    shape = (args.layers, *LEAF[1:])
    rows = {}
    for name, make in OPTIMIZERS.items():
        if args.only in name:
            # optax's products of a cut matrix have no unique sharding, which Explicit axes refuse.
            kind = AxisType.Auto if name.startswith("optax") else AxisType.Explicit
            rows[name] = measure(make, shape, kind)
            print(name, rows[name], flush=True)
    if rows.keys() == OPTIMIZERS.keys() and shape == LEAF:
        about = {"leaf": shape, "dtype": "float32", "chips": "64 x TPU v5p, compiled only", "mesh": [8, 8]}
        record.write("muon_memory", "python -m benchmarks.muon_memory", about | {"optimizers": rows})


if __name__ == "__main__":
    main()
