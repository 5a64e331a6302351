"""For tests, ours and yours: tiny models of every family, several ranks on one machine, and the contract of mixins.

What the contract says of models spread over processes is in `swissarmy.testing.sharding`, which imports DTensor.
"""

from swissarmy.testing.contract import CHECKS, Addition, check_mixin
from swissarmy.testing.distributed import run_distributed
from swissarmy.testing.tiny import TINY_CONFIGS, tiny_inputs, tiny_model

__all__ = [
    "CHECKS",
    "TINY_CONFIGS",
    "Addition",
    "check_mixin",
    "run_distributed",
    "tiny_inputs",
    "tiny_model",
]
