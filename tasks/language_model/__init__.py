"""Loading language models, their chat format, and packed prefill: shared by the stages that hold a model."""
