"""The service around the engine: model store, Triton's run time, supervisor, system check."""
