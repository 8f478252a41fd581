"""ZNorm in real training: several processes, a compiled model, low precision, and an environment with only torch."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from models import NetworkConfig, build_network
from znorm import attach

Call = Callable[..., Any]
GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "znorm-in-your-own-loop.md"

TWO_PROCESSES = """
import sys
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
import znorm

rank, rendezvous, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)


def train():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.GroupNorm(1, 6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 1, 1)]
    model = nn.Sequential(*layers).double()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    znorm.attach(optimizer, wrapped)
    batches = torch.randn((5, 4, 2, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for batch in batches:
        wrapped(batch[2 * rank : 2 * rank + 2]).square().mean(dim=(1, 2, 3)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        torch.save(model.state_dict(), out)


train()  # Its network, which holds the process group, is gone before the group: gloo's threads end before Python.
distributed.destroy_process_group()
"""


def test_two_processes_match_one_with_the_combined_batch(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TWO_PROCESSES]
    started = [subprocess.Popen([*words, str(rank), tmp_path / "meet", tmp_path / "weights.pt"]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.GroupNorm(1, 6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 1, 1)]
    model = nn.Sequential(*layers).double()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(optimizer, model)
    for batch in torch.randn((5, 4, 2, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        model(batch).square().mean(dim=(1, 2, 3)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), model.state_dict(), rtol=0, atol=1e-9)


def network() -> nn.Module:
    torch.manual_seed(0)
    config = NetworkConfig(architecture="resunet", channels=(4, 8), residual_units=1)
    return build_network(config, in_channels=4, out_channels=3)


def image() -> Tensor:
    return torch.randn((1, 4, 8, 8, 8), generator=torch.Generator().manual_seed(3))


def two_steps(forward: Callable[[Tensor], Tensor], model: nn.Module, attach_to: nn.Module) -> list[Tensor]:
    """Weights after two steps."""
    optimizer = AdamW(model.parameters(), lr=1e-2)
    attach(optimizer, attach_to)
    for _ in range(2):
        forward(image()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("given", ["the compiled model", "the plain model"])
def test_a_compiled_model_takes_the_same_steps_as_an_eager_one(given: str) -> None:
    plain, model = network(), network()
    compiled: Any = torch.compile(model, backend="aot_eager")
    found = two_steps(compiled, model, compiled if given == "the compiled model" else model)
    torch.testing.assert_close(found, two_steps(plain, plain, plain))


def test_steps_under_bfloat16_autocast_are_close_to_float32_steps() -> None:
    plain, model = network(), network()

    def autocast(inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = model(inputs).float()
            return found

    found, expected = two_steps(autocast, model, model), two_steps(plain, plain, plain)
    assert all(bool(torch.isfinite(weight).all()) for weight in found)
    before = [parameter.detach() for parameter in network().parameters()]
    change = sum(float((a - b).abs().sum()) for a, b in zip(expected, before, strict=True))
    gap = sum(float((a - b).abs().sum()) for a, b in zip(expected, found, strict=True))
    assert gap < 0.3 * change


def test_a_model_with_bfloat16_weights_can_be_trained() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 1)).bfloat16()
    before: Any = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model)
    model(torch.randn(8, 4).bfloat16()).square().mean().backward()
    optimizer.step()
    moved = (model[0].weight - before[0].weight).detach().float()
    assert handle.skipped_steps == 0
    assert float(moved.std(correction=0)) == pytest.approx(0.1, rel=0.05)


def test_the_guide_runs_with_only_torch(shell: Call, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    barred = ("monai", "nibabel", "pydantic", "typer", "app", "data", "models", "scipy")
    lines = [f"import sys; sys.modules.update(dict.fromkeys({barred!r}))", code]
    (tmp_path / "loop.py").write_text("\n".join(lines))
    ended = shell(["python", tmp_path / "loop.py"])
    assert ended.code == 0, ended.err
    assert "0 steps skipped" in ended.out
    assert float(re.findall(r"loss ([\d.]+)", ended.out)[0]) < 0.9


def test_the_loop_of_the_guide_is_short() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
