"""Check the inputs and the machine of a run before its ranks start: data, tokenizer, weights, verifier, packages.

torch is imported only to count GPUs, where the settings need them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Container, Sequence

from megatron_entropy import packages, procedural
from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.fp8 import RECIPES
from megatron_entropy.config.performance import PerformanceConfig
from megatron_entropy.config.schema import Config
from megatron_entropy.config.speedups import resolve
from megatron_entropy.errors import ConfigError, DataError, MissingPackageError
from megatron_entropy.launch.gpu_memory import GIGABYTE, check_gpu_memory
from megatron_entropy.methods import build_method
from megatron_entropy.methods.base import Method
from megatron_entropy.records import Prompt
from megatron_entropy.rollout.placement import gpus_beside_the_trainer

MIN_PROCESSES = 64
"""Ranks and engines that every machine may start, however few cores it has."""


def check_model_folder(folder: str, arch: ModelArchitecture) -> None:
    """Compare the headers of a folder's safetensors files with the architecture; Megatron checkpoints are skipped.

    Raises:
        ModelError: a file is damaged or missing, or a tensor does not fit.
    """
    from megatron_entropy.weights.headers import check_model

    if not any(os.path.exists(os.path.join(folder, name)) for name in ("shards", ".metadata")):
        check_model(folder, arch)


def check_data(config: Config, model_folder: str, arch: ModelArchitecture) -> None:
    """Read every data file, load the tokenizer, render and tokenize one row of each file, and grade one answer.

    Single rows may lack a column: they may turn out too long and be skipped.

    Args:
        config: the stage's settings.
        model_folder: the model that the run starts from, whose tokenizer is used where the settings name none.
        arch: its architecture.
    Raises:
        UserError: a file that cannot be read, a column that every row lacks, no row within the limits, a tokenizer or
            chat template that does not work, or a verifier that cannot be called.
    """
    from megatron_entropy.data.dataset import load_prompts, read_prompts  # import pyarrow, which `--help` must not
    from megatron_entropy.data.tokenizer import load_tokenizer
    from megatron_entropy.rewards import VERIFIERS, check_grader

    data, method = config.data, build_method(config)
    _check_gym(config, VERIFIERS)
    read_prompts(data.eval, schema=data.format, columns=data.columns)
    prompts = read_prompts(data.train, schema=data.format, columns=data.columns)
    if not any(_can_select(method, prompt) for prompt in prompts):
        method.select(prompts)
    tokenizer = load_tokenizer(data.tokenizer or model_folder, vocab_size=arch.vocab_size)
    max_target_tokens = None if method.uses_rollouts else config.rollout.max_response_tokens
    for files, limit in ((data.train, max_target_tokens), (data.eval, None)):
        if files:
            load_prompts(files, tokenizer, data, max_target_tokens=limit, first_only=True)
    if method.uses_rollouts or data.eval:
        answers = (prompt.answer for prompt in prompts if prompt.answer is not None)
        check_grader(config.reward, next(answers, "1"))


def _check_gym(config: Config, verifiers: Container[str]) -> None:
    """See that reasoning-gym is installed where it is needed, and that the verifier fits its questions."""
    verifier, sources = config.reward.verifier, [*config.data.train, *config.data.eval]
    if verifier == "reasoning_gym":
        procedural.load_package()
    elif verifier in verifiers and (mixed := [source for source in sources if procedural.is_source(source)]):
        raise ConfigError(
            f"reward.verifier={verifier} cannot read the ground truths of {mixed[0]}; set "
            'reward.verifier = "reasoning_gym"'
        )


def _can_select(method: Method, prompt: Prompt) -> bool:
    """Whether the prompt has every column that the method needs."""
    try:
        method.select([prompt])
    except DataError:
        return False
    except ConfigError:  # about the number of prompts
        return True
    return True


def check_memory(config: Config, arch: ModelArchitecture) -> None:
    """See that the weights fit on this machine's GPUs, if it has any and starts engines.

    Raises:
        ConfigError: they do not.
    """
    if _has_driver() and not config.rollout.replay and _samples(config) and (gpus := count_gpus()):
        import torch

        smallest = min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))
        check_gpu_memory(config, arch, smallest / GIGABYTE)


def check_engine_gpus(config: Config) -> None:
    """See that this machine, where rank 0 is, has GPUs for the engines beside those of its ranks.

    Raises:
        ConfigError: it has too few; in a joined Ray cluster this is seen when it has been joined.
    """
    needs_own = not config.rollout.colocate and not config.rollout.replay and not os.environ.get("RAY_ADDRESS")
    if needs_own and count_gpus() and _samples(config):
        gpus_beside_the_trainer(config.rollout)


def check_packages(config: Config) -> None:
    """See that the optional packages and devices are there which the settings need.

    Raises:
        MissingPackageError: a package is missing.
        ConfigError: a setting that this machine cannot obey, or a folder to replay that does not exist.
    """
    rollout, log, actor = config.rollout, config.log, config.actor
    for package, needed_by, is_needed in (
        ("tensorboard", "log.tensorboard=true", log.tensorboard),
        ("wandb", f"log.wandb_project={log.wandb_project}", log.wandb_project),
    ):
        if is_needed and importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"{needed_by} needs the package {package.replace('_', '-')}, which is not installed; see "
                "megatron-entropy doctor, or change the setting"
            )
    if actor.fp8.recipe and not actor.fp8.emulate:
        _check_fp8(actor.fp8.recipe)
    if actor.performance != PerformanceConfig() or _has_driver():
        resolve(actor)
    if (transfer := rollout.weight_transfer) in ("nccl", "cuda_ipc") and not count_gpus():
        raise ConfigError(
            f"rollout.weight_transfer={transfer} needs a GPU, and this machine has none; change the setting"
        )
    if transfer == "cuda_ipc" and not packages.installed_versions(["cuda-bindings"]):
        raise MissingPackageError(
            "rollout.weight_transfer=cuda_ipc needs the package cuda-bindings, which is not installed; see "
            "megatron-entropy doctor, or change the setting"
        )
    if rollout.quantization and not rollout.replay:
        _check_quantization(rollout.quantization)
    if rollout.nodes and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"rollout.nodes={rollout.nodes} chooses among the nodes of a Ray cluster; join one with RAY_ADDRESS, or "
            "leave it out"
        )
    if not rollout.replay and not os.environ.get("RAY_ADDRESS") and _samples(config):
        _check_vllm()
    if rollout.replay and not os.path.isdir(rollout.replay):
        raise ConfigError(f"rollout.replay: no such folder: {rollout.replay}")


def _check_fp8(recipe: str) -> None:
    import torch

    from megatron_entropy.launch.fp8 import recipe_problem

    engine = packages.installed_versions(["transformer-engine"]).get("transformer-engine")
    if problem := recipe_problem(recipe, _devices(), torch.version.cuda, engine):
        raise ConfigError(problem)


def _check_quantization(name: str) -> None:
    """See that the GPUs of this machine have FP8 units; engines of a Ray cluster may run on others."""
    if os.environ.get("RAY_ADDRESS"):
        return
    needed = RECIPES["mxfp8" if name == "mxfp8" else "current"].first_capability
    lacking = [capability for _, capability in _devices() if capability < needed]
    if lacking or not count_gpus():
        found = f"found {'.'.join(map(str, lacking[0]))}" if lacking else "and this machine has none"
        raise ConfigError(
            f"rollout.quantization={name} needs a GPU of compute capability {'.'.join(map(str, needed))} or higher, "
            f"{found}; leave it out"
        )


def _devices() -> list[tuple[str, tuple[int, int]]]:
    import torch

    return [
        (torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)) for index in range(count_gpus())
    ]


def _samples(config: Config) -> bool:
    """Whether the stage uses engines."""
    return build_method(config).uses_rollouts or bool(config.data.eval)


def _check_vllm() -> None:
    versions = packages.installed_versions((*packages.VLLM, "torch"))
    vllm = next((name for name in packages.VLLM if name in versions), "")
    found = packages.range_problems(versions, packages.requirements_of("megatron-entropy"), ["vllm"])
    found += packages.vllm_problems(versions, packages.requirements_of(vllm), "+cpu" in versions.get("torch", ""))
    if found:
        raise MissingPackageError(found[0])


def check_machine(configs: Sequence[Config]) -> None:
    """See that one machine can start the ranks, and the engines unless they join a Ray cluster.

    Raises:
        ConfigError: they are more than a machine of its cores can hold.
    """
    cores = len(os.sched_getaffinity(0))
    limit = max(MIN_PROCESSES, 8 * cores)
    ranks = configs[0].actor.parallel.world_size
    if ranks > limit:
        raise ConfigError(
            f"actor.parallel needs tp*pp*cp*dp = {ranks} ranks; this machine ({cores} cores) starts at most {limit}; "
            "lower actor.parallel.dp, or start them with torchrun on several machines"
        )
    for config in configs:
        engines = config.rollout.num_engines * config.rollout.tensor_parallel
        if engines > limit and not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(
                f"rollout.num_engines * rollout.tensor_parallel = {engines} processes; this machine ({cores} cores) "
                f"starts at most {limit}; lower one of them, or join a Ray cluster with RAY_ADDRESS"
            )


def _has_driver() -> bool:
    """Whether there may be GPUs; without a driver torch would be imported for nothing."""
    return os.path.exists("/proc/driver/nvidia/version")


def count_gpus() -> int:
    """Number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()
