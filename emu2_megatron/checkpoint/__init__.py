import emu2_megatron.platform.device  # noqa: F401  (before megatron-core: see its docstring)
