"""What a user would otherwise install or write, a file each; found by looking into this folder.

A module has

- ``VARIANTS``: for each label the keyword arguments of ``build``;
- ``PACKAGE``: the one whose version matters; ``INSTALL``: how to get what it needs, in words;
- ``EXACT``: whether it is a softmax over ``dense_table``;
- ``build(cell, ...)``: returns an instance. It imports the package, and raises ``Unavailable`` where that cannot run.
"""

import importlib
import pkgutil
from types import ModuleType


def modules() -> dict[str, ModuleType]:
    """Return the modules of this folder by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
