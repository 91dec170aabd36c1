"""`argosy k8s`: puts a ServingSpec on a cluster and operates it. One file per noun; commands.py wires them."""
