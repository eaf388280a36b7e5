"""The dense half of a model: norms, attention, MLPs and the loss, each with its backends."""
