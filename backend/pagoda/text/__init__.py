"""Text in, token ids out, and back. No torch, no transformers: `tokenizers` and a sandboxed Jinja do it."""
