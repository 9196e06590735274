# Pin it by digest for builds that have to be repeatable: --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# Everything but the code, so that editing the code does not install the libraries again; the install only points at /app.
COPY pyproject.toml constraints.txt Makefile LICENSE README.md ./
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN mkdir app \
    && touch app/__init__.py \
    && PIP_NO_CACHE_DIR=1 make install PYTHON=python TORCH_INDEX_URL=${TORCH_INDEX_URL}

FROM ${PYTHON_IMAGE}
# A compiler: what the model's layers run on is made for the processor that they run on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --home-dir /app/data --no-create-home --shell /usr/sbin/nologin service
WORKDIR /app
COPY --from=build /app/.venv .venv
COPY . .
RUN .venv/bin/python -m compileall -q app \
    && mkdir data \
    && chown service:service data
# All that the service writes goes to /app/data and /tmp: the rest may be mounted read-only.
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/app/data/huggingface \
    APP__HOST=0.0.0.0
USER 10001
VOLUME /app/data
EXPOSE 8000
STOPSIGNAL SIGTERM
# /health is 200 while the process lives.  No proxy, whatever the environment says.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('APP__PORT', '8000') + '/health', timeout=4)"]
CMD ["python", "-m", "app", "serve"]
