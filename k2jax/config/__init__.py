"""Frozen dataclasses that describe a run, and the way from a config file to them.

This room imports nothing of the project, so every other one may import it for its types. What cannot work is refused
here, before any device work, with a ValueError that names the field, its value and the fix.
"""

from k2jax.config.load import apply_overrides, config_dict, load_config, load_config_module, run_config
from k2jax.config.model import GQAConfig, MLAConfig, MoBAConfig, ModelConfig, MoEConfig, RopeConfig
from k2jax.config.run import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    Stage,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "GQAConfig",
    "MLAConfig",
    "MeshConfig",
    "MoBAConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeConfig",
    "RunConfig",
    "SourceConfig",
    "Stage",
    "StageConfig",
    "TrainConfig",
    "apply_overrides",
    "config_dict",
    "load_config",
    "load_config_module",
    "run_config",
]
