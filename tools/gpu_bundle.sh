#!/usr/bin/env bash
# Archive of what `make test-gpu` needs and a GPU machine without a network lacks: Transformer Engine, megatron-core and
# the small packages of this project. torch 2.11 for CUDA 13, triton and transformers are expected there, with Python 3.12.
#
#   tools/gpu_bundle.sh OUT            needs Python 3.12, nvcc, 12 GB of disk; minutes
#   ARCHITECTURES="90 100"             GPU code to keep (Hopper alone unless set)
#   VLLM=0.29.0                        a second archive with vLLM and what it needs beyond torch and transformers
#   LIMIT=60M                          largest file; a larger archive is split into .part-aa, .part-ab, ...
#
# On the GPU machine: cat OUT/gpu_site.tar.xz* | tar xJf - -C DIR, export PYTHONPATH=DIR/site, make test-gpu PYTHON=python3
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ $# = 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-$(ls "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3 2>/dev/null | head -1 || true)}
python=${python:-python3.12}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "error: $python is not Python 3.12" >&2; exit 2; }
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
[ -x "$CUDA_HOME/bin/nvcc" ] || { echo "error: no nvcc in $CUDA_HOME/bin; set CUDA_HOME" >&2; exit 2; }
engine=2.20.2 # Transformer Engine
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu_bundle.XXXXXX")
trap 'rm -rf "$work"' EXIT

pack() { # name folder: OUT/name.tar.xz, split where it is larger than LIMIT
	find "$work/$2" -name __pycache__ -prune -exec rm -rf {} +
	rm -f "$out/$1.tar.xz"*
	tar -C "$work" -c "$2" | xz -T2 -6 >"$out/$1.tar.xz"
	local limit
	limit=$(numfmt --from=iec "${LIMIT:-60M}")
	if [ "$(stat -c %s "$out/$1.tar.xz")" -gt "$limit" ]; then
		split -b "$limit" "$out/$1.tar.xz" "$out/$1.tar.xz.part-"
		rm "$out/$1.tar.xz"
	fi
	(cd "$out" && sha256sum "$1".tar.xz* && ls -l "$1".tar.xz*)
}

"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install --no-deps -r "$here/requirements/modern.txt"
pip install 'setuptools<81' wheel ninja pybind11 onnxscript # Transformer Engine imports onnxscript
pip install --no-deps "transformer-engine-cu13==$engine" "transformer-engine==$engine" \
	nvdlfw-inspect 'nvidia-cudnn-frontend>=1.29' importlib-metadata zipp
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=2
export CPLUS_INCLUDE_PATH=$site/nvidia/cudnn/include:$site/nvidia/nccl/include:$site/nvidia/cu13/include
pip install --no-build-isolation --no-deps --no-binary :all: "transformer-engine-torch==$engine"
read -ra architectures <<<"${ARCHITECTURES:-90}"
"$work/venv/bin/python" "$here/tools/strip_fatbin.py" \
	"$site/transformer_engine/wheel_lib/libtransformer_engine.so" "${architectures[@]}"

copy_site() { # from to: everything but what the machine has: torch, triton and transformers with what they need
	mkdir "$2"
	for entry in "$1"/*; do
		case ${entry##*/} in
		torch | torch-* | torchgen | functorch | nvidia | nvidia_* | cuda | cuda_* | cusparselt* | triton | triton-* | \
			pip | pip-* | setuptools | setuptools-* | pkg_resources | _distutils_hack | distutils-precedence.pth | \
			wheel | wheel-* | ninja | ninja-* | pybind11 | pybind11-* | megatron_entropy* | __pycache__) ;;
		transformers* | tokenizers* | huggingface_hub* | hf_xet* | safetensors* | numpy* | regex* | yaml | _yaml | pyyaml* | \
			sympy* | mpmath* | isympy* | networkx* | jinja2* | markupsafe* | fsspec* | filelock* | tqdm*) ;;
		*) cp -r "$entry" "$2/" ;;
		esac
	done
}
copy_site "$site" "$work/site"
cp -r "$site"/nvidia_cudnn_frontend* "$work/site/"
LD_LIBRARY_PATH=$site/nvidia/nccl/lib:$site/nvidia/cudnn/lib PYTHONPATH=$work/site "$work/venv/bin/python" -W ignore -c '
import megatron.core, pytest, transformer_engine.pytorch
print("imported from the archive:", megatron.core.__version__, transformer_engine.__file__)'
pack gpu_site site

if [ -n "${VLLM:-}" ]; then
	"$work/venv/bin/python" -m venv "$work/vllm_venv"
	"$work/vllm_venv/bin/python" -m pip --disable-pip-version-check -q install "vllm==$VLLM" torch==2.11.0 "$here[eval]"
	copy_site "$(echo "$work"/vllm_venv/lib/python3*/site-packages)" "$work/vllm_site"
	pack gpu_vllm vllm_site
fi
