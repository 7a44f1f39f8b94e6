"""What no domain owns: whole files on disk, errors as one sentence for the user, text for Markdown, models of transformers.

Imports nothing else of `hf_ls`.
"""
