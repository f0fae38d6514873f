# canopy with torch for the CPU; for a GPU: docker build --build-arg TORCH=cu128 -t canopy:cuda .
# and docker run --gpus all ... The workers of compose.yaml run the same image.
FROM python:3.11-slim

# The name of one of PyTorch's wheel indexes: cpu, cu126, cu128.
ARG TORCH=cpu
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" torch torchvision

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY canopy canopy
COPY configs configs
COPY data_manifests data_manifests
ARG EXTRAS=stac,lidar,gedi,serve
RUN pip install --no-cache-dir ".[${EXTRAS}]" && rm -rf /src

RUN useradd --create-home canopy && mkdir /data && chown canopy /data
USER canopy
WORKDIR /data
ENV CANOPY_CACHE=/home/canopy/.cache/canopy OMP_NUM_THREADS=1
ENTRYPOINT ["canopy"]
CMD ["--help"]
