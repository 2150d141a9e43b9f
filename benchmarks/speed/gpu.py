"""Sampling, updates and whole steps on one GPU, beside what it can do at most and beside transformers and TRL.

A part that fails is told in the record and the others are run: time on a GPU is dear. The record is written after each.
"""

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.speed import gpu_peaks, gpu_sampling, gpu_steps, gpu_update
from benchmarks.speed.compare import SCRATCH, provenance
from benchmarks.speed.workers.shared import version

PARTS = ("peaks", "generate", "update", "step")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gpu`."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries out the wiring")
    parser.add_argument("--quick", action="store_true", help="small shapes, to try it out")
    parser.add_argument("--compile", action="store_true", help="updates again with train.compile")
    parser.add_argument("--rounds", type=int, default=2, help="of the step part")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a worker in a round")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where models and runs are written")
    parser.add_argument("--commit", help="of this code, where its folder is no repository")
    parser.add_argument("--json", type=Path, help="where every raw number is written")


def gpu(arguments: argparse.Namespace) -> None:
    """Run the parts, print their tables, write the numbers; exit 1 when any part failed."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu --quick tries the benchmark out")
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    record: dict[str, Any] = {**provenance(), **_machine(device), "quick": arguments.quick, "failed": {}}
    record["commit"] = arguments.commit or record["commit"]
    quick, peaks = arguments.quick, gpu_peaks.measure(device, quick=arguments.quick)
    record["peaks"] = asdict(peaks)
    console.print(
        f"peaks: {peaks.flops / 1e12:,.1f} TFLOP/s bf16, {peaks.bytes_per_second / 1e9:,.0f} GB/s copied"
    )
    parts: dict[str, Callable[[], Any]] = {
        "generate": lambda: gpu_sampling.measure(device, peaks, quick=quick),
        "update": lambda: gpu_update.measure(device, peaks, quick=quick, compiled=arguments.compile),
        "step": lambda: gpu_steps.measure(
            device,
            quick=quick,
            rounds=arguments.rounds,
            steps=arguments.steps,
            scratch=arguments.scratch.resolve(),
        ),
    }
    tables = {
        "generate": lambda found: [gpu_sampling.table(found)],
        "update": lambda found: [gpu_update.table(found)],
        "step": gpu_steps.tables,
    }
    for name in (part for part in PARTS if part in parts and part in arguments.parts):
        try:
            record[name] = parts[name]()
            console.print(*tables[name](record[name]))
        except Exception as error:  # whatever it is, the parts after it are still worth running
            record["failed"][name] = traceback.format_exc()
            print(f"{name} failed: {error}\n{record['failed'][name]}", file=sys.stderr, flush=True)
        _write(record, arguments.json)
        gc.collect()
        torch.cuda.empty_cache()
    _write(record, arguments.json)
    sys.exit(1 if record["failed"] or record.get("step", {}).get("failed") else 0)


def _machine(device: torch.device) -> dict[str, Any]:
    """The device's name and memory, and versions of packages."""
    versions = {name: version(name) for name in PACKAGES}
    if device.type != "cuda":
        return {"device": {"name": "cpu"}, "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": {"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda},
        "versions": versions,
    }


def _write(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
