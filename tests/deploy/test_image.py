"""The image of deploy/Dockerfile, built and run: its kernels load and it answers a request."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.deploy.image import Container, Image, build_context
from tests.deploy.ready import completion_of
from tests.stack import free_port

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts need root on Linux"),
    pytest.mark.timeout(1500),
    pytest.mark.nightly,
]


@pytest.mark.parametrize("light", [True, False], ids=["light", "full"])
def test_the_image_serves_on_its_native_kernels(tmp_path: Path, light: bool) -> None:
    image = Image.of(DOCKERFILE.read_text(), {"TORCH_INDEX": ""})
    assert image.user.isdigit(), "Kubernetes' runAsNonRoot needs a number"
    build_context(ROOT, tmp_path / "context")
    port = free_port()
    with Container(image, tmp_path / "context", tmp_path, light=light) as container:
        container.start("serve", "--port", str(port), "--model", "examples/demo-model", "--run-dir", "/tmp/run")
        answer = completion_of(port, container.running, container.output, 600 if light else 1200)
        said = container.output()
    assert answer["usage"]["completion_tokens"] >= 1
    built, _, served = said.partition("BUILT\n")
    assert "native kernels: " in built
    assert "torch serves alone" not in served
