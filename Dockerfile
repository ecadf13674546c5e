# What the deployments `gpu` and `ray` of prefect.yaml run in: Python, CUDA from torch's own wheels, vLLM, this project.
#
#   docker build --tag near-policy-distillation:gpu .
#
# The host needs NVIDIA's driver and its container toolkit. `make lint` has hadolint look at this file.
FROM python:3.11-slim-trixie

# Triton compiles a kernel's launcher when the kernel is first used.
# Debian's archive keeps one version of a package, so one that is pinned here would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Owned by the user that runs flows, and so are the volumes that Docker makes of them.
RUN useradd --create-home --uid 10001 npd \
    && install --directory --owner=npd --group=npd /home/npd/.cache /opt/npd /opt/npd/runs
WORKDIR /opt/npd

# Dependencies before code: their layer, many gigabytes, is made again only when they change.
ARG EXTRAS=vllm,liger,lora,quantization,ray,reasoning-gym,s3
COPY pyproject.toml README.md LICENSE ./
COPY deploy/constraints.txt deploy/
RUN pip install --no-cache-dir --constraint deploy/constraints.txt ".[${EXTRAS}]"

# Deployments name flows by their path below this folder, so the code stays where it is copied to.
COPY schemas schemas
COPY tasks tasks
COPY flows flows
COPY configs configs
RUN pip install --no-cache-dir --no-deps --constraint deploy/constraints.txt --editable .

ENV PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1
USER 10001
# No entry point: Prefect's workers bring the whole command.
CMD ["npd", "--help"]
