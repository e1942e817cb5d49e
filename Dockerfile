# nemo_longctx inside NVIDIA's NeMo container, whose torch, NeMo, Megatron-Core and transformers stay as they are:
#   docker build --build-arg NEMO_IMAGE=IMAGE:TAG -t nemo-longctx .
# IMAGE:TAG is a NeMo framework container of 25.07 or later from NVIDIA's catalogue.
ARG NEMO_IMAGE
FROM ${NEMO_IMAGE}
COPY . /opt/nemo-longctx
# The host is there already: no extra is asked for but the harness, and nothing that is installed may move.
RUN pip freeze | grep -iE '^(torch|numpy|transformers|megatron[-_]core|nemo[-_]toolkit|lightning)==' > /opt/host.txt \
 && pip install --no-cache-dir --constraint /opt/host.txt "/opt/nemo-longctx[eval]" \
 && nemo-longctx doctor
WORKDIR /workspace
