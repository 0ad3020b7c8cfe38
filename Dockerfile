# JupyterLab on the notebooks: docker build -t robustnb . && docker run --rm -p 8888:8888 robustnb
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home reader && install -d -o reader /home/reader/robustnb
USER reader
WORKDIR /home/reader/robustnb
COPY --chown=reader . .
RUN make env TORCH_INDEX=$TORCH_INDEX
EXPOSE 8888
CMD ["make", "lab", "ARGS=--ip=0.0.0.0 --no-browser"]
