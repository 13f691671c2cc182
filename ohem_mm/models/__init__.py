"""Parts of a model and its training that configs build. Importing this registers them.

They need mmengine.
"""

from .frozen import FrozenBackbone
from .optim import Bf16OptimWrapper

__all__ = ["Bf16OptimWrapper", "FrozenBackbone"]
