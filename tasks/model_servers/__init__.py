"""vLLM servers that run a model in place of this process: what they are asked, and which of them are trusted."""
