"""For tests, ours and yours: tiny models of every family, several ranks on one machine, and the contract of mixins."""

from swissarmy.testing.contract import CHECKS, Addition, check_mixin
from swissarmy.testing.distributed import run_distributed
from swissarmy.testing.sharding import SHARDED_CHECKS, check_sharded
from swissarmy.testing.tiny import TINY_CONFIGS, tiny_inputs, tiny_model

__all__ = [
    "CHECKS",
    "SHARDED_CHECKS",
    "TINY_CONFIGS",
    "Addition",
    "check_mixin",
    "check_sharded",
    "run_distributed",
    "tiny_inputs",
    "tiny_model",
]
