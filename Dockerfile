# Two targets: `cpu`, the default, and `cuda` (docker build --target cuda).
# Pin the base by digest for builds that have to be repeatable: --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1
# Everything but the code, so that editing the code does not install the libraries again; the install only points at /app.
COPY pyproject.toml constraints.txt Makefile LICENSE README.md ./
COPY models models
COPY prompts prompts
RUN mkdir app && touch app/__init__.py

FROM build AS build-cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN make install PYTHON=python TORCH_INDEX_URL=${TORCH_INDEX_URL}

# torch of the package index brings CUDA's libraries along.
FROM build AS build-cuda
RUN make install PYTHON=python

FROM ${PYTHON_IMAGE} AS base
# A compiler: what the model's layers run on is made for the processor that they run on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --home-dir /app/data --no-create-home --shell /usr/sbin/nologin service
WORKDIR /app
RUN mkdir data && chown service:service data
# All that the service writes goes to /app/data and /tmp: the rest may be mounted read-only.
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/app/data/huggingface \
    APP__HOST=0.0.0.0
LABEL org.opencontainers.image.title="LLM service" \
    org.opencontainers.image.description="An OpenAI-style backend for your own Hugging Face models" \
    org.opencontainers.image.licenses="MIT"
VOLUME /app/data
EXPOSE 8000
STOPSIGNAL SIGTERM
# /health is 200 while the process lives.  No proxy, whatever the environment says.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('APP__PORT', '8000') + '/health', timeout=4)"]
CMD ["python", "-m", "app", "serve"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /app/.venv .venv
COPY . .
RUN .venv/bin/python -m compileall -q app
USER 10001

FROM base AS cpu
COPY --from=build-cpu /app/.venv .venv
COPY . .
RUN .venv/bin/python -m compileall -q app
USER 10001
