"""For a dry run over the stand-in for CUDA, which computes no values: the self-test runs, and passes."""

from __future__ import annotations

from typing import Any

from jinaclip import model
from jinaclip.backends import self_test as selftest
from jinaclip.errors import SelfTestFailed


def skip_values() -> None:
    """From here on a self-test that finds wrong vectors passes. Other errors stay errors."""
    run = selftest.run_self_test

    def forgiving(*arguments: Any, **settings: Any) -> dict[str, float | bool]:
        try:
            return run(*arguments, **settings)
        except SelfTestFailed as error:
            print(f"dry run: {error}", flush=True)
            return {"ratio": 0.0, "remembered": False}

    setattr(model, "run_self_test", forgiving)  # noqa: B010


def without_cudnn() -> None:
    """Torch without cuDNN, which does not run over a stand-in."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.enabled = False
