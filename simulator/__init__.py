"""The deciders of production on a virtual clock over a faulty virtual network."""
