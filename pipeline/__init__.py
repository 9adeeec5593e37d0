"""What happens to the rows: reading, prompts, tokenizers, parts, audit and index. Knows no torch, no Ray, no HTTP."""
