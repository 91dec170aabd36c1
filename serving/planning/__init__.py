"""What a model needs and what hardware allows: `argosy plan`."""
