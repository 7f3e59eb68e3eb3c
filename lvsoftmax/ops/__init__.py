"""Pure functions on tensors: all numerics, no parameters, no modules, no configuration."""
