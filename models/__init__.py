"""A model folder becomes a policy, on one process or many."""
