"""The training loop and what it stands on; `train.loop` is the place to start reading.

`vrpo.train` is both this package and the public function `vrpo.train(config, out=...)`: importing any module
below makes Python bind the package to that name, so the package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """See `vrpo.train.api.train`."""
        from vrpo.train.api import train

        return train(*arguments, **settings)


sys.modules[__name__].__class__ = _CallablePackage
