"""An OpenAI-compatible HTTP server in front of Triton. Imports no torch; of `pagoda` only the torch-free part."""
