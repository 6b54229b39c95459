"""Training, conversion and inference of Emu2 with tensor, pipeline and data parallelism on megatron-core."""

__version__ = "0.1.0"
