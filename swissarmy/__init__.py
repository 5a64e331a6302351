"""swissarmy: one Transformer backbone; everything else is a mixin. Write `import swissarmy as sat`.

The public names are listed in `swissarmy/api.py`. They are imported when the first of them is used, so that
`sat --help`, usage errors and Ctrl-C need not wait for torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swissarmy.api import *  # noqa: F403
else:

    def __getattr__(name):
        """A public name or a subpackage, which from now on is an ordinary attribute."""
        if name.startswith("__") and name != "__all__":  # what tools look for, and few modules have
            raise AttributeError(f"module 'swissarmy' has no attribute '{name}'")
        import importlib

        api = importlib.import_module("swissarmy.api")
        if name == "__all__" or name in api.__all__:
            globals()[name] = getattr(api, name)
        if name not in globals():
            raise AttributeError(f"module 'swissarmy' has no attribute '{name}'")
        return globals()[name]

    def __dir__():
        """The public names, loaded or not."""
        from swissarmy.api import __all__

        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
