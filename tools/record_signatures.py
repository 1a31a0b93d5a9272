"""Record the signatures of vLLM and megatron-core that this package calls, from a version's files.

A version's wheel is unpacked, not installed; `ast` reads it, nothing is imported:

    pip download --no-deps vllm==0.33.0 -d wheels && unzip -q wheels/vllm-0.33.0*.whl '*.py' -d wheels/0.33.0
    python tools/record_signatures.py vllm 0.33.0 wheels/0.33.0/vllm

tests/unit/test_versions.py compares every call in our source with what is recorded.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "tests" / "unit" / "fixtures" / "signatures.json"

WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {
        "distributed/weight_transfer/base.py": ("WeightTransferEngine",),
        "distributed/weight_transfer/factory.py": ("WeightTransferEngineFactory",),
        "model_executor/model_loader/reload/layerwise.py": (
            "initialize_layerwise_reload",
            "finalize_layerwise_reload",
            "finalize_layerwise_processing",
        ),
        "v1/engine/llm_engine.py": ("LLMEngine",),
        "v1/worker/gpu_worker.py": ("Worker",),
        "engine/arg_utils.py": ("EngineArgs",),
        "sampling_params.py": ("SamplingParams",),
    },
    "megatron-core": {
        "core/model_parallel_config.py": ("ModelParallelConfig",),
        "core/transformer/transformer_config.py": ("TransformerConfig",),
        "core/distributed/distributed_data_parallel_config.py": ("DistributedDataParallelConfig",),
        "core/optimizer/optimizer_config.py": ("OptimizerConfig",),
        "core/models/gpt/gpt_layer_specs.py": (
            "get_gpt_layer_with_transformer_engine_spec",
            "get_gpt_layer_with_transformer_engine_submodules",
            "get_gpt_layer_local_spec",
            "get_gpt_layer_local_submodules",
        ),
        "core/models/gpt/gpt_model.py": ("GPTModel",),
        "core/optimizer/__init__.py": ("get_megatron_optimizer",),
        "core/distributed/distributed_data_parallel.py": ("DistributedDataParallel",),
        "core/optimizer_param_scheduler.py": ("OptimizerParamScheduler",),
        "core/distributed/finalize_model_grads.py": ("finalize_model_grads",),
        "core/pipeline_parallel/schedules.py": ("forward_backward_no_pipelining",),
        "core/transformer/transformer_block.py": ("TransformerBlockSubmodules",),
        "core/tensor_parallel/layers.py": ("set_tensor_model_parallel_attributes",),
        "core/transformer/utils.py": ("make_sharded_tensors_for_checkpoint",),
        "core/parallel_state.py": ("initialize_model_parallel",),
    },
}
"""Functions and classes by file, relative to the package."""

METHODS = {
    "LLMEngine": ("add_request", "collective_rpc", "from_engine_args", "has_unfinished_requests")
    + ("reset_prefix_cache", "sleep", "step", "wake_up"),
    "Worker": ("finish_weight_update", "init_weight_transfer_engine", "start_weight_update", "update_weights"),
    "GPTModel": ("__init__", "forward"),
    "DistributedDataParallel": ("__init__",),
    "OptimizerParamScheduler": ("__init__", "step"),
}
"""Recorded methods of large classes; of the others all."""


def record(package: str, folder: Path) -> dict[str, Any]:
    """Return what a version has of `WANTED`: parameters of functions and methods, fields of classes, in one text."""
    found: dict[str, Any] = {"parameters": {}, "abstract": [], "fields": {}}
    for file, names in WANTED[package].items():
        for node in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8"))):
            if getattr(node, "name", None) not in names:
                continue
            if isinstance(node, ast.FunctionDef):
                found["parameters"].setdefault(node.name, _parameters(node))
            elif isinstance(node, ast.ClassDef):
                _record_class(node, found)
    return found


def _record_class(node: ast.ClassDef, found: dict[str, Any]) -> None:
    fields = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
    if fields:
        found["fields"][node.name] = " ".join(fields)
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name not in METHODS.get(node.name, (method.name,)):
            continue
        name = f"{node.name}.{method.name}"
        found["parameters"].setdefault(name, _parameters(method))
        if any("abstractmethod" in ast.unparse(decorator) for decorator in method.decorator_list):
            found["abstract"].append(name)


def _parameters(node: ast.FunctionDef) -> str:
    """The parameters as source: without types, and with None for every default."""
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    for argument in (arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    nothing = ast.Constant(None)
    arguments.defaults = [nothing for _ in arguments.defaults]
    arguments.kw_defaults = [None if default is None else nothing for default in arguments.kw_defaults]
    return ast.unparse(arguments)


def main() -> None:
    """Add one version to the fixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=WANTED)
    parser.add_argument("version")
    parser.add_argument("folder", type=Path, help="of the package's modules: .../vllm, .../megatron")
    args = parser.parse_args()
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    table.setdefault(args.package, {})[args.version] = record(args.package, args.folder)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
