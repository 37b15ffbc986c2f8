"""jinaclip: embeddings of texts and images with Jina CLIP v2, from an exported bundle and without torch.

from jinaclip import ClipModel

model = ClipModel("bundle/")
texts = model.encode_text(["a cup of coffee", "一杯咖啡"], truncate_dim=256)
images = model.encode_image(["coffee.jpg", "cat.jpg"], truncate_dim=256)
model.similarity(texts, images)
"""

from importlib.metadata import version

from jinaclip.backends.onnxruntime.library import share_threads
from jinaclip.errors import (
    BackendError,
    BackendMissing,
    BundleError,
    EngineMismatch,
    InputError,
    JinaClipError,
    Overloaded,
    SelfTestFailed,
)
from jinaclip.model import ClipModel

__version__ = version("jinaclip")

__all__ = [
    "BackendError",
    "BackendMissing",
    "BundleError",
    "ClipModel",
    "EngineMismatch",
    "InputError",
    "JinaClipError",
    "Overloaded",
    "SelfTestFailed",
    "__version__",
    "share_threads",
]
