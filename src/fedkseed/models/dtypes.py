"""In which precision a model is loaded. (Without torch, so that settings can say it.)"""

from typing import Literal

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
"""Of the weights; auto is what the checkpoint says."""
