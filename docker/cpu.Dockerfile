# Trains and tests on the CPU. Build from the repository's root (it has been written, but never built):
#   docker build -f docker/cpu.Dockerfile -t neuron-lightning:cpu .
#   docker run --rm -it --shm-size 2g neuron-lightning:cpu make quickstart
# The index that pip is configured with decides which torch comes; one without CUDA libraries is enough:
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf …
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make git \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer/neuron_lightning

COPY --chown=trainer . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,mode=0444 make setup

CMD ["make", "quickstart"]
