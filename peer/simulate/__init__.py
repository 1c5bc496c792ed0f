"""The whole network in virtual time: the product's own code, and everything around it simulated."""
