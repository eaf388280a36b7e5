"""Several devices: the mesh, sharding, gradients, loading and saving."""
