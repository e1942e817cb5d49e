# nemo_longctx in NVIDIA's NeMo container: torch, Transformer Engine, apex, NeMo and Megatron-Core stay the container's.
#   docker build -t nemo-longctx . && docker run --gpus all -it nemo-longctx nemo-longctx doctor
ARG NEMO=nvcr.io/nvidia/nemo:25.07
FROM ${NEMO}
COPY . /opt/nemo-longctx
# What the container has is the constraint: pip fails here rather than replace any of it.
RUN pip list --format=freeze \
    | grep -iE '^(torch|numpy|transformers|tokenizers|transformer[-_]engine.*|flash[-_]attn|nemo[-_]toolkit|megatron[-_]core|lightning)==' \
    > /tmp/container.txt \
    && pip install --no-cache-dir --constraint /tmp/container.txt '/opt/nemo-longctx[eval,instruct]' \
    && nemo-longctx doctor
