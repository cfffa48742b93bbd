# Trains on trn1 and inf2 through PyTorch/XLA, of Neuron 2.31, the last release that ships it (AWS ended its support for
# training with 2.30). Written to the public documentation of the Neuron SDK and linted; it has never been built or run.
# From the repository's root:
#   docker build -f docker/xla.Dockerfile -t neuron-lightning:xla .
#   docker run --rm --device /dev/neuron0 neuron-lightning:xla
#   docker run --rm --shm-size 8g --device /dev/neuron0 neuron-lightning:xla \
#     torchrun --standalone --nproc-per-node 2 examples/llama/pretrain.py fit --config examples/llama/configs/quickstart.yaml
# The host needs the driver (aws-neuronx-dkms), and each chip a --device of its own. Several instances need AWS's EFA
# libraries in the image as well. trn2 and trn3: docker/neuron.Dockerfile.

# Its Python is 3.12; the release supports 3.11 to 3.13.
FROM ubuntu:24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG DEBIAN_FRONTEND=noninteractive

# Ubuntu's packages are not pinned: its archive keeps the latest of a release only.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG NEURON_COLLECTIVES_VERSION=2.33.10.0
ARG NEURON_RUNTIME_VERSION=2.33.10.0
ARG NEURON_TOOLS_VERSION=2.31.15.0
ADD --chmod=0644 https://apt.repos.neuron.amazonaws.com/GPG-PUB-KEY-AMAZON-AWS-NEURON.PUB /etc/apt/keyrings/neuron.asc
# A package's version ends in a hash, which the asterisk stands for.
RUN . /etc/os-release \
    && echo "deb [signed-by=/etc/apt/keyrings/neuron.asc] https://apt.repos.neuron.amazonaws.com ${VERSION_CODENAME} main" \
        > /etc/apt/sources.list.d/neuron.list \
    && apt-get update \
    && apt-get install --yes --no-install-recommends \
        "aws-neuronx-collectives=${NEURON_COLLECTIVES_VERSION}*" \
        "aws-neuronx-runtime-lib=${NEURON_RUNTIME_VERSION}*" \
        "aws-neuronx-tools=${NEURON_TOOLS_VERSION}*" \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer/neuron_lightning
RUN python3 -m venv /home/trainer/venv
ENV PATH=/home/trainer/venv/bin:/opt/aws/neuron/bin:$PATH \
    LD_LIBRARY_PATH=/opt/aws/neuron/lib \
    PIP_EXTRA_INDEX_URL="https://pip.repos.neuron.amazonaws.com https://download.pytorch.org/whl/cpu"

ARG TORCH_VERSION=2.9.0
ARG TORCH_XLA_VERSION=2.9.0
ARG TORCH_NEURONX_VERSION=2.9.0.2.15.32035
ARG NEURONX_CC_VERSION=2.26.6360.0
ARG NEURONX_DISTRIBUTED_VERSION=0.19.28492
RUN pip install --no-cache-dir \
        "torch==${TORCH_VERSION}" \
        "torch-xla==${TORCH_XLA_VERSION}" \
        "torch-neuronx==${TORCH_NEURONX_VERSION}" \
        "neuronx-cc==${NEURONX_CC_VERSION}" \
        "neuronx-distributed==${NEURONX_DISTRIBUTED_VERSION}" \
    && pip freeze > /home/trainer/neuron-packages.txt

# What the package needs, before its sources, which change more often; nothing of Neuron's set may change for it.
ARG LIGHTNING_VERSION=2.6.6
COPY --chown=trainer setup.py pyproject.toml README.md ./
RUN pip install --no-cache-dir --constraint /home/trainer/neuron-packages.txt "lightning==${LIGHTNING_VERSION}" ".[llama,xla]"

COPY --chown=trainer neuron_lightning neuron_lightning
COPY --chown=trainer examples examples
RUN pip install --no-cache-dir --no-deps --force-reinstall --editable . \
    && pip check

# The backend is chosen by this; NEURON_LIGHTNING_BACKEND=cpu trains without Neuron cores.
ENV PJRT_DEVICE=NEURON

# Any other command in its place is run as it stands.
CMD ["neuron-lightning", "env"]
