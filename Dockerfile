# CPU image: the trainer, vLLM for CPU, the examples and the tests.
#   docker build -t entropy-trainer . && docker run --rm -it entropy-trainer make demo
#
# GPU image (not built or run yet): start from a CUDA PyTorch image of Python 3.11 or newer instead, keep its torch, leave
# requirements/cpu.txt out, and install `pip install '.[gpu]'` (Transformer Engine, vLLM). Run it with `--gpus all`,
# `--ipc=host` and `--ulimit memlock=-1`. `megatron-entropy doctor` shows which fused parts are active.
FROM python:3.11-slim

# gcc and headers: entropy_kernels builds its bf16 product, Triton its launcher. make: the targets below.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev libnuma1 libgomp1 make git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
# The packages first: they change seldom. A copy of setup.py is enough for `make setup` to know what to install.
COPY Makefile setup.py pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY kernels kernels
COPY megatron_entropy megatron_entropy
RUN make setup PYTHON=/usr/local/bin/python3.11
COPY . .
ENV PATH=/workspace/.venv/bin:$PATH
CMD ["megatron-entropy", "--help"]
