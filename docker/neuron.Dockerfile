# Trains on trn2 and trn3 through TorchNeuron, of Neuron 2.33. Written to the public documentation of the Neuron SDK and
# linted; it has never been built or run. From the repository's root:
#   docker build -f docker/neuron.Dockerfile -t neuron-lightning:neuron .
#   docker run --rm --device /dev/neuron0 neuron-lightning:neuron
#   docker run --rm --shm-size 8g --device /dev/neuron0 neuron-lightning:neuron \
#     torchrun --standalone --nproc-per-node 4 examples/llama/pretrain.py fit --config examples/llama/configs/quickstart.yaml
# The host needs the driver (aws-neuronx-dkms), and each chip a --device of its own. Several instances need AWS's EFA
# libraries in the image as well. trn1 and inf2: docker/xla.Dockerfile.

# TorchNeuron's wheels are for Ubuntu 26.04, whose Python is 3.14.
FROM ubuntu:26.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG DEBIAN_FRONTEND=noninteractive

# Ubuntu's packages are not pinned: its archive keeps the latest of a release only.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG NEURON_COLLECTIVES_VERSION=2.35.43.0
ARG NEURON_RUNTIME_VERSION=2.35.30.0
ARG NEURON_TOOLS_VERSION=2.33.38.0
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

ARG TORCH_VERSION=2.13.0
ARG TORCH_NEURONX_VERSION=2.13.3.0
ARG NEURONX_CC_VERSION=2.28.7631.0
ARG NKI_VERSION=0.7.0
RUN pip install --no-cache-dir \
        "torch==${TORCH_VERSION}" \
        "torch-neuronx==${TORCH_NEURONX_VERSION}" \
        "neuronx-cc==${NEURONX_CC_VERSION}" \
        "nki==${NKI_VERSION}" \
    && pip freeze > /home/trainer/neuron-packages.txt

# What the package needs, before its sources, which change more often; nothing of Neuron's set may change for it.
ARG LIGHTNING_VERSION=2.6.6
COPY --chown=trainer setup.py pyproject.toml README.md ./
RUN pip install --no-cache-dir --constraint /home/trainer/neuron-packages.txt "lightning==${LIGHTNING_VERSION}" ".[llama]"

COPY --chown=trainer neuron_lightning neuron_lightning
COPY --chown=trainer examples examples
RUN pip install --no-cache-dir --no-deps --force-reinstall --editable . \
    && pip check

# Any other command in its place is run as it stands.
CMD ["neuron-lightning", "env"]
