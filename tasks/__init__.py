"""The stages of Near-Policy Distillation, one room each, in the order of the loop."""
